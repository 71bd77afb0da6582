"""cat."""


def add(commands): ...
