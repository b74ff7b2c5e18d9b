"""The run-time type checker of the tests."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is welcome where a float is annotated, as it is to users and to pyright."""
