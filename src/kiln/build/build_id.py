"""Names of builds: 16 characters that sort by time, safe in file names, URLs and control groups (pure)."""

# Crockford's alphabet: no letter that reads like a digit.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_TIME_CHARACTERS, _RANDOM_CHARACTERS = 9, 7


def build_id(time_ms: int, random_bits: int) -> str:
    """The id of a build accepted at `time_ms` (Unix, milliseconds: 45 bits last until 3084), with 35 random bits."""
    return _digits(time_ms, _TIME_CHARACTERS) + _digits(random_bits, _RANDOM_CHARACTERS)


def _digits(number: int, length: int) -> str:
    return "".join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(length)))
