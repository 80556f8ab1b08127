"""The zoo: one folder a model (its card, recipe and weights), and the network
definitions that the recipes share.

An installed wheel has them here, a checkout in its folder ``models/``. They are written
against composeprob's public API alone, so a folder there is also an example of how to
add a model of one's own.
"""

from pathlib import Path

if not Path(__file__).with_name("networks").is_dir():
    __path__ = [str(Path(__file__).parents[2] / "models")]
