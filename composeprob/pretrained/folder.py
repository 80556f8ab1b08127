"""Where a model lies: a folder, or a name on a hub that a cache on this machine or a download makes a folder of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from composeprob.errors import LoadError
from composeprob.json_data import JSON
from composeprob.pretrained.config import read_json
from composeprob.pretrained.tensors import refuse_pickles


@dataclass(frozen=True)
class Folder:
    """A model's folder: of a pipeline with a folder for each component, or of one network.

    Attributes:
        path: where it lies.
        components: the class of each component by its name; empty for one network.
    """

    path: Path
    components: dict[str, str]

    def component_path(self, component: str) -> Path:
        """The folder of a component."""
        return self.path / component if self.components else self.path


def find(path: str | os.PathLike[str]) -> Folder:
    """Finds a model's folder.

    Args:
        path: a folder, or ``owner/name`` on a hub.

    Raises:
        LoadError: there is none, or it holds no model.
    """
    place = Path(path).expanduser()
    if place.is_file():
        refuse_pickles(place)
        raise LoadError(
            f"{place} is a file; a model is a folder with model_index.json or config.json in it.",
            fix=f"pass the folder: {place.parent}.",
        )
    if not place.is_dir():
        place = _from_hub(str(path))
    if (place / "model_index.json").exists():
        index = read_json(place / "model_index.json")
        classes = {name: entry[1] for name, entry in index.items() if _is_component(entry)}
        if outside := [name for name in classes if Path(name).name != name or "\\" in name or name == ".."]:
            raise LoadError(
                f"{place / 'model_index.json'} has a component {outside[0]!r}, which is no folder beside it; nothing "
                "outside of a model's folder is read.",
                fix="name the component's folder alone; if you do not know why it is so, delete the folder.",
            )
        return Folder(place, classes)
    if (place / "config.json").exists():
        return Folder(place, {})
    refuse_pickles(place)
    raise LoadError(
        f"There is neither model_index.json nor config.json in {place}.",
        fix="give a folder as diffusers' save_pretrained writes it; its from_single_file reads single files.",
    )


def _is_component(entry: JSON) -> bool:
    """Whether an entry of the index is a (library, class) pair of a component that is there."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def _from_hub(name: str) -> Path:
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~", "/")):
        raise LoadError(f"There is no folder {name}.", fix="check the path, or give owner/name of a model on the hub.")
    try:
        import huggingface_hub
    except ImportError as error:
        raise LoadError(
            f"There is no folder {name}, and to look on the hub the package huggingface_hub is missing.",
            fix="pip install 'composeprob[hub]', or check the path.",
        ) from error
    try:
        wanted = [f"{folder}*.{kind}" for folder in ("", "*/") for kind in ("json", "safetensors", "txt")]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of many kinds: of the network, of the hub, of the cache
        raise LoadError(
            f"There is no folder {name}, and the hub gives no model of that name: {str(error).splitlines()[0]}",
            fix="check the name; without a network, download it before or set HF_HUB_OFFLINE=1 to use the cache only.",
        ) from error
