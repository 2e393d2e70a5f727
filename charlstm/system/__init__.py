"""Terminals, paths and what libraries print: the surroundings of a process."""
