"""The one exception for mistakes a user can fix: the command line prints its message alone, without a traceback."""


class InputError(ValueError):
    """A bad config, image, video, record, checkpoint or mesh. The message names the file and the field and says what to do."""


EXIT_INPUT = 2  # exit status of a command that was given one
