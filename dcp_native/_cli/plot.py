"""plot."""


def add(commands): ...
