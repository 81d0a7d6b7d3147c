"""Models from and to the Hugging Face Hub: ``hf:ORG/REPO[:FILE or quant][@revision]``.

huggingface_hub does the talking: the login (no token is ever taken from elsewhere), the endpoint
(``HF_ENDPOINT``) and its cache, which is looked into first and is all there is when offline. What it does
not do is done here: an interrupted download goes on where it stopped, also in another process, and every
file is compared with the checksum that the Hub states (SHA-256 of large files, git's own of small ones)
before the model gets its name.

A redirect to another host is how the Hub serves large files; the token is not sent there. Beside the GGUF
file, the files ``template``, ``system`` and ``params`` of a repository are read and written: where the Hub
documents that Ollama looks for them.
"""

from __future__ import annotations

import json
import re
import warnings
from typing import TYPE_CHECKING

from azquant.errors import ArgumentError, AzquantError, AzquantWarning, HubError
from azquant.gguf import open_gguf
from azquant.store import go_json
from azquant.store import manifest as media
from azquant.store._hub_client import HubClient, HubPlace, RemoteFile
from azquant.store.build import config_for
from azquant.store.info import ModelRow, read_row
from azquant.store.layout import PARTIAL, Progress, hash_file
from azquant.store.manifest import Layer, Manifest
from azquant.store.names import ModelName
from azquant.store.parameters import PARAMETERS

if TYPE_CHECKING:
    from azquant.store.store import Store

__all__ = ["HubPlace", "pull", "push"]

_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_TYPE = re.compile(
    r"(?<![A-Za-z0-9])(I?Q[2-8]_(?:[A-Z0-9]+_?[A-Z]*|[0-9])|BF16|F16|F32)(?![A-Za-z0-9])", re.IGNORECASE
)
_SMALL = {"template": media.TEMPLATE, "system": media.SYSTEM, "params": media.PARAMS}


def pull(
    store: Store,
    source: str,
    name: str | None = None,
    *,
    endpoint: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ModelRow:
    """Download a model into the store; as ``hf.co/ORG/REPO:<file or quant>`` unless ``name`` says otherwise.

    Raises HubError for what the Hub does not have, does not let be read, cuts short or gives altered;
    nothing of an altered file is kept. Run again after an interruption, it goes on where it stopped.
    """
    place = HubPlace.parse(source)
    hub = HubClient(endpoint)
    if name is not None:
        store._new(name, overwrite)
    files, commit = hub.files(place)
    chosen = _choose(place, files)
    target = store._new(_name_for(place, chosen) if name is None else name, overwrite)
    layout = store._layout
    small = {
        media_type: hub.read_small(place, files[file_name], commit)
        for file_name, media_type in _SMALL.items()
        if file_name in files
    }
    local = hub.cached(place, chosen, commit)
    if local is None:
        local = hub.download(place, chosen, commit, layout.blobs, progress)
    try:
        with open_gguf(local) as file:
            config = config_for(file)
    except AzquantError:
        if local.name.startswith(PARTIAL):
            local.unlink(missing_ok=True)
        raise
    config["source"] = f"hf:{place.repo}:{chosen.name}@{commit or place.revision or 'main'}"
    with store._adding() as layout:
        if local.name.startswith(PARTIAL):
            layer = Layer(media.MODEL, hash_file(local), chosen.size)
            layout.adopt(local, layer)
        else:
            layer = layout.add_file(local, media.MODEL, progress)
        layers = [layer]
        for media_type, data in small.items():
            data = _parameters(data, place) if media_type == media.PARAMS else data
            if data.strip():
                layers.append(layout.add_bytes(data, media_type))
        config["rootfs"] = {"type": "layers", "diff_ids": [layer.digest for layer in layers]}
        manifest = Manifest(layout.add_bytes(go_json.encode(config), media.CONFIG), tuple(layers))
        replaced = store._publish(target, manifest.encode(), overwrite)
    store._collect(replaced)
    return read_row(layout, target)


def push(
    store: Store,
    name: str,
    target: str,
    *,
    endpoint: str | None = None,
    create: bool = False,
    private: bool = False,
) -> str:
    """Upload a model in one commit; its URL. The file is ``<model>-<tag>.gguf`` unless ``target`` names one.

    ``create`` makes the repository (``private`` or public) and the branch where they are missing. Raises
    HubError.
    """
    place = HubPlace.parse(target)
    info = store.show(name)
    if info.path is None:
        raise ArgumentError(f"the model {name} is not a GGUF model")
    hub = HubClient(endpoint)
    file_name = place.file or f"{info.name.model}-{info.name.tag}.gguf"
    texts = {"template": info.template, "system": info.system}
    contents = {key: text.encode() for key, text in texts.items() if text}
    if info.parameters:
        contents["params"] = go_json.encode(dict(sorted(info.parameters.items())))
    with hub.explaining(place):
        if create:
            hub.api.create_repo(place.repo, private=private, exist_ok=True)
            if place.revision is not None:
                hub.api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        add = hub.library.CommitOperationAdd
        done = hub.api.create_commit(
            place.repo,
            [
                add(path_in_repo=file_name, path_or_fileobj=str(info.path)),
                *(add(path_in_repo=key, path_or_fileobj=data) for key, data in contents.items()),
            ],
            commit_message=f"Upload {info.name}",
            revision=place.revision,
        )
    return str(done.commit_url)


def _choose(place: HubPlace, files: dict[str, RemoteFile]) -> RemoteFile:
    """The GGUF file that is meant. Raises HubError, which lists what there is."""
    if place.file in files:
        return files[place.file]
    models = [name for name in files if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
    wanted = place.file
    if wanted is not None:
        pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(wanted)}(?![A-Za-z0-9_])", re.IGNORECASE)
        matching = [name for name in models if pattern.search(name.rpartition("/")[2])]
    else:
        matching = models
    whole = [name for name in matching if not _SPLIT.search(name)]
    if len(whole) == 1:
        return files[whole[0]]
    what = f"hf:{place.repo}" + (f":{wanted}" if wanted else "")
    if matching and not whole:
        raise HubError(
            f"{what} is split over {len(matching)} files, which is not supported: merge them first"
        )
    if whole:
        raise HubError(f"{what} could be any of {', '.join(whole[:20])}; name the file after a colon")
    listed = f"; it has {', '.join(models[:20])}" if models else "; it has no GGUF file"
    raise HubError(f"{what}: there is no such file{listed}")


def _name_for(place: HubPlace, chosen: RemoteFile) -> str:
    stem = chosen.name.rpartition("/")[2].removesuffix(".gguf")
    if place.file is not None:
        tag = stem if place.file == chosen.name else place.file
    else:
        found = _TYPE.search(stem)
        tag = found[1] if found else "latest"
    if place.revision is not None:
        tag = f"{tag}-{place.revision}"
    name = f"hf.co/{place.repo}:{re.sub('[^A-Za-z0-9_.-]', '-', tag)[:80]}"
    try:
        ModelName.parse(name)
    except ArgumentError as error:
        raise ArgumentError(f"{error}; give the model a name of your own") from None
    return name


def _parameters(data: bytes, place: HubPlace) -> bytes:
    """The file ``params``: a JSON object; names that are no parameters are left out with a warning."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise HubError(f"the file params of hf:{place.repo} is no JSON object")
    unknown = sorted(set(value) - set(PARAMETERS))
    if unknown:
        warnings.warn(
            f"params of hf:{place.repo}: unknown {unknown[:10]}; left out", AzquantWarning, stacklevel=4
        )
    known = {key: item for key, item in sorted(value.items()) if key in PARAMETERS}
    return go_json.encode(known) if known else b""
