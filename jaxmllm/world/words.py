"""The words that pages are set in. The tiny tokenizer gives each of them a token of its own."""

PAGE_WORDS = tuple(
    """
    apple arm art baby back ball band bank bird boat body book box boy bread bus cake camp car card care cat
    chair city class cloud coat cold cook corn cow cup dance dark day deer desk dog door dream drum duck earth
    east egg eye face farm fast fire fish flag floor fog food foot frog game garden gate gift girl glass goat
    gold grass hand happy hat heart hill home honey horse house ice ink iron island jam joy key king kite lake
    lamp land leaf lemon letter light lion map market moon morning mother mountain mouse music name nest night
    north ocean page paint paper park path peace pen people picture pilot plane plant poem pond queen rabbit
    rain river road rock roof room rope salt sand school sea seed ship shoe silver sky snow song south spoon
    spring stone storm story street sugar summer sun table teacher tent time toy train tree valley village voice
    wall water west wheel wind window winter wolf wood word world year zoo
    """.split()
)
RECEIPT_ITEMS = tuple(
    "bread milk eggs butter cheese rice tea coffee juice water soap paper apples lemons tomatoes fish chicken soup "
    "salad pizza pasta cake cookies candy batteries shampoo towel notebook pencil stamps".split()
)
RECEIPT_WORDS = tuple("shop store market cafe receipt invoice total tax cash change date thank you".split())
