"""placeholder, written by the runtime owner"""


def install() -> None:
    pass
