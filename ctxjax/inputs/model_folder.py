"""Open a model folder: architecture, weights, tokenizer and stop ids."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jax.sharding import Mesh
from tokenizers import Tokenizer
import transformers
from transformers import PreTrainedTokenizerFast

from ctxjax.host.hub import find_folder
from ctxjax.inputs import tokenizer_match
from ctxjax.models import mesh_check
from ctxjax.models.attention import choose_kind
from ctxjax.models.hf import load as hf_load
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """What a run needs of a Hugging Face folder. ``params``: a nested dict of arrays on the mesh. ``pad_id``: a row of
    the embedding that padding has; no result depends on it. ``adapter``: that the student starts from, which ``params``
    then contain, joined (models/lora.py); None for a new one."""

    config: ModelConfig
    params: Params | None
    tokenizer: object
    stop_ids: tuple[int, ...]
    pad_id: int
    adapter: Params | None = None

    def check_prompts(self, prompts: list[list[int]], max_tokens: int, field: str = "rollout.max_tokens") -> None:
        """Raise ValueError if the model cannot read a prompt, or not with ``max_tokens`` response tokens after it.

        ``field``: the name of ``max_tokens`` in messages.
        """
        longest, most = max((len(ids) for ids in prompts), default=0), self.config.max_positions
        if longest + max_tokens > most:
            raise ValueError(
                f"a prompt of {longest} tokens and {field} = {max_tokens} are together more than the model's {most} "
                f"positions (max_position_embeddings in its config.json); lower {field}, shorten the context, leave "
                f"long rows out (prompt.max_context_tokens={max(most - max_tokens, 1)} with prompt.overlong=drop), or "
                "take a model for longer texts"
            )
        largest = max((max(ids, default=0) for ids in prompts), default=0)
        if largest >= self.config.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"a prompt has the token {token!r} with the id {largest}, and the model has only "
                f"{self.config.vocab_size} rows; leave {token} out of the questions and contexts"
            )


def load_tokenizer(path: Path):
    """Load the folder's tokenizer: text becomes tokens as tokenizer.json says.

    The other files name the special tokens and the chat template. AutoTokenizer would build the class that they name
    anew, and drop what that class does not know of tokenizer.json. Raises FileNotFoundError if there is no
    tokenizer.json, and ValueError if it cannot be read, contradicts tokenizer_config.json, or has no chat template.
    """
    path = Path(path)
    if not (path / "tokenizer.json").exists():
        raise FileNotFoundError(_explain_missing_tokenizer(path))
    try:
        file = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"the tokenizer in {path} cannot be read: {error}; copy tokenizer.json again") from None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the tokenizer in {path} cannot be read: {error}") from None
    # tokenizer_config.json may describe the same tokens in another way, such as with the white space around them.
    tokenizer.add_tokens(list(file.get_added_tokens_decoder().values()))
    _check_agrees_with_file(path, tokenizer, file)
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer in {path} has no chat template; put one into its tokenizer_config.json (chat_template), or "
            "use the folder of an instruct model; docs/models.md has one for base models"
        )
    return tokenizer


def _explain_missing_tokenizer(path: Path) -> str:
    older = [name for name in ("tokenizer.model", "vocab.json") if (path / name).exists()]
    if not older:
        return f"{path} has no tokenizer (tokenizer.json); copy the model's tokenizer files there"
    return (
        f'{path} has {older[0]}, but no tokenizer.json; make it there with: python -c "from transformers import '
        "AutoTokenizer as T; T.from_pretrained('.').save_pretrained('.')\" (needs the packages sentencepiece, protobuf)"
    )


def _check_agrees_with_file(path: Path, tokenizer, file: Tokenizer) -> None:
    """Raise ValueError if ids that tokenizer_config.json names, or the tokens of a text, are not tokenizer.json's."""
    named = _read_json(path / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for index, token in named.items():
        if tokenizer.convert_ids_to_tokens(int(index)) != token["content"]:
            raise ValueError(
                f"{path}: tokenizer_config.json gives the id {index} to {token['content']!r}, tokenizer.json to "
                f"{file.id_to_token(int(index))!r}; copy both files from one model"
            )
    file.no_truncation()
    file.no_padding()
    text = tokenizer_match.make_probe(tokenizer)
    if tokenizer(text, add_special_tokens=False)["input_ids"] != file.encode(text, add_special_tokens=False).ids:
        raise ValueError(
            f"transformers {transformers.__version__} does not read {path}/tokenizer.json as the file says; install "
            "another version"
        )


def _read_json(path: Path) -> dict:
    """Return the JSON object in a file, {} if there is no file. Raises ValueError if it is anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a valid JSON object: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a valid JSON object: it is a {type(fields).__name__}")
    return fields


def read_stop_ids(path: Path, tokenizer) -> tuple[int, ...]:
    """Return the sorted ids that end a response: those of generation_config.json and of the tokenizer together.

    As in transformers, config.json counts if there is no generation_config.json.
    """
    path = Path(path)
    file = next((path / name for name in ("generation_config.json", "config.json") if (path / name).exists()), None)
    named = None if file is None else _read_json(file).get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    if not all(token is None or type(token) is int for token in named):
        raise ValueError(f"{file}: eos_token_id = {named} must be an id or a list of ids")
    ids = {tokenizer.eos_token_id, *named} - {None}
    if not ids:
        raise ValueError(
            f"{path} has no end token, neither in generation_config.json nor in its tokenizer; set eos_token_id"
        )
    return tuple(sorted(ids))


def open_folder(
    path: str | Path,
    mesh: Mesh,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    attention: str = "auto",
    student: ModelFolder | None = None,
) -> ModelFolder:
    """Load a Hugging Face folder onto ``mesh``. ``param_dtype``: of the weights. For the rest see ``read_folder``,
    which refuses what it can before any weights are fetched or read."""
    model = read_folder(path, mesh, dtype, remat, attention, student)
    return dataclasses.replace(model, params=hf_load.load(find_folder(path), model.config, mesh, param_dtype))


def read_folder(
    path: str | Path,
    mesh: Mesh,
    dtype: str = "float32",
    remat: str = "none",
    attention: str = "auto",
    student: ModelFolder | None = None,
    tokenizer=None,
) -> ModelFolder:
    """Read all but the weights of a Hugging Face folder; ``params`` is None. ``path``: a local folder or a Hub id
    (host.hub.find_folder), of which only small files are fetched.

    ``dtype``: of the model's arithmetic. "auto": bfloat16 on accelerators, float32 on CPUs, where bfloat16 is slow.
    ``attention``: see models.attention.choose_kind.
    ``student``: given if the folder is the student's teacher; a different tokenizer is then refused. ``tokenizer``: the
    folder's, if it is loaded already. Raises FileNotFoundError or ValueError, which names the folder, the problem and
    the remedy.
    """
    path = find_folder(path, weights=False)
    device = mesh.devices.flat[0]
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    config = hf_load.read_config(path, dtype, remat)
    config = dataclasses.replace(config, attention=choose_kind(attention, config, device))
    mesh_check.check_model_fits_mesh(config, mesh, str(path))
    tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
    if student is not None:
        tokenizer_match.check_same_tokenizer(student.tokenizer, tokenizer)
    # Fine-tunes add a pad token without a row. Padding is never read, so another id serves.
    has_pad = tokenizer.pad_token_id is not None and tokenizer.pad_token_id < config.vocab_size
    # Not len(tokenizer), the number of tokens: some vocabularies have gaps in their ids.
    ids = max(id for id in tokenizer.get_vocab().values() if has_pad or id != tokenizer.pad_token_id) + 1
    if ids > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {ids} ids, but the head only {config.vocab_size} rows; copy the tokenizer "
            "files that belong to these weights"
        )
    ends = read_stop_ids(path, tokenizer)
    if not 0 <= ends[0] <= ends[-1] < config.vocab_size:
        raise ValueError(
            f"{path}: the end tokens {ends} are not all ids of the head, which has {config.vocab_size} rows; fix "
            "eos_token_id in generation_config.json"
        )
    pad = tokenizer.pad_token_id if has_pad else ends[0]
    if ids < config.vocab_size:
        config = dataclasses.replace(config, tokens=ids)
    return ModelFolder(config, None, tokenizer, ends, pad)
