"""diff."""


def add(commands): ...
