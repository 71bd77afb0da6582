"""convert."""


def add(commands): ...
