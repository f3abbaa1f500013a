"""Names of kings, as they are written."""

import roman


def name(given, number):
    """Returns the name of a king, given which one of that name he is."""
    return f"{given} {roman.toRoman(number)}"
