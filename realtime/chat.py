"""placeholder"""


def run(url: str, session: str | None) -> int:
    raise NotImplementedError
