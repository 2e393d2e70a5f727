"""The default recipe: good text in about two minutes on two CPU cores.

python launch/train.py

1.812 bits per character on the last tenth of Dracula, the mean of three seeds (1.801 to 1.826). The
whole command took 94 to 134 s on two CPU cores, of which other guests took their share, before
model.rms_norm, which adds a tenth; with it, 711 s on one core of an older, slower processor. How it
was found is in BUILD.md.
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return base_config() as it stands."""
    return base_config()
