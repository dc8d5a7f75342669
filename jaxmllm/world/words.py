"""The words that pages are set in. The tiny tokenizer gives each of them a token of its own."""

PAGE_WORDS = tuple(
    """
    apple art ball bird body book box boy bus cake car cat chair city class cloud coat cold corn dark day dog
    door dream face fire fish flag food frog game garden grass hat hill home horse house ice island key king
    kite land lemon light lion map moon morning mouse music nest night page paint paper park pen people plant
    rain river road rock roof room salt sand school sea ship shoe sky snow song spoon spring stone story street
    sugar summer sun table time toy train tree wall water west wind window winter wolf wood word world year
    """.split()
)
RECEIPT_ITEMS = tuple(
    "bread milk eggs butter cheese rice tea coffee juice water soap paper apples lemons fish chicken soup "
    "salad pizza pasta cake candy pencil".split()
)
RECEIPT_WORDS = tuple("shop store market cafe receipt invoice total tax cash change date thank you".split())
