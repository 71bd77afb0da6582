"""bench."""


def add(commands): ...
