"""What is wrong with a request or a message of the protocol."""

from kiln.errors import Invalid


class RequestInvalid(Invalid):
    """A build request breaks a rule of `kiln.build.validate.RULES`.

    `field` is the wire's name of the field (`outputs`, `constraints.system`, or empty for the whole request), `index`
    the place in a repeated one, or -1; `why` is the message without them.
    """

    def __init__(self, *, field: str, index: int, rule: str, why: str) -> None:
        where = field if index < 0 else f"{field}[{index}]"
        super().__init__(f"{where or 'request'}: {why}")
        self.field = field
        self.index = index
        self.rule = rule
        self.why = why


class Malformed(Invalid):
    """Bytes or text that do not parse as the message they should be; `line` and `column` count from 1, 0: not known."""

    def __init__(self, what: str, why: str, *, line: int = 0, column: int = 0) -> None:
        where = f" at line {line} column {column}" if line else ""
        super().__init__(f"not a {what}{where}: {why}")
        self.what = what
        self.line = line
        self.column = column


class OptionInvalid(Invalid):
    """An option of a build has a value that means nothing."""

    def __init__(self, option: str, why: str) -> None:
        super().__init__(f"option {option}: {why}")
        self.option = option
