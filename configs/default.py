"""The default recipe: good text in about two minutes on two CPU cores.

python launch/train.py

1.814 bits per character on the last tenth of Dracula, the mean of three seeds (1.812 to 1.816), in
167 s for the whole command on two cores of an AMD EPYC of which other guests took their share. How
it was found is in BUILD.md.
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return base_config() as it stands."""
    return base_config()
