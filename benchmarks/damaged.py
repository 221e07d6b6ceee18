"""Damaged model directories: one seeded change each, and what loading makes of it.

    python -m benchmarks.damaged            writes benchmarks/damaged.json

A change removes, retypes or replaces a value of a JSON file, or cuts, renames, empties or swaps a
file. Loading refuses it with a clear error, or loads a model whose weights are those of the file.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equipoise.config import Sampling
from equipoise.dials.files import file_hashes
from equipoise.dials.tokens import install, save_dial_model
from equipoise.engine.sample import TransformersEngine
from equipoise.errors import EquipoiseError
from equipoise.models.load import LoadedPolicy, load_causal
from equipoise.tune.lora import add_lora
from equipoise.types import Branch, GenerationRequest, Message

OUT = Path(__file__).with_name("damaged.json")
N_CHANGES = 200
ATTRIBUTES = ("helpfulness", "safety")
UNUSED = ("README.md",)
"""Files of a model directory that nothing reads."""
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 135\n"
RETYPED: tuple[Any, ...] = ("text", 7, None, [1, "a"], True, {"a": {"b": 1}})
EDGES: tuple[Any, ...] = (0, -1, 10**12, "", float("nan"), [])
FILE_KINDS = ("cut", "emptied", "renamed", "swapped", "pointer")
JSON_KINDS = ("removed", "retyped", "edge value")


NAMES = ("tuned, full weights", "tuned, LoRA", "foreign", "foreign, shards", "foreign, LoRA",
         "reward model")  # fmt: skip
Kept = tuple[Path, int, Callable[[Path], None]]


@dataclass(frozen=True)
class Change:
    """One change of one file."""

    file: str
    kind: str
    what: str
    apply: Callable[[Path], None]


def tokenizer() -> Any:
    """A byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    markers = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    letters = [*markers, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", additional_special_tokens=markers[1:]
    )
    fast.chat_template = TEMPLATE
    return fast


def sizes(n_tokens: int, **changes: Any) -> dict[str, Any]:
    """Sizes of a tiny Llama."""
    return {
        "vocab_size": n_tokens,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 0,
        **changes,
    }


def foreign(directory: Path) -> Path:
    """Save a plain model, as anybody would."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes(len(fast)))).save_pretrained(directory)
    fast.save_pretrained(directory)
    names = {"eos_token": "<|end|>", "additional_special_tokens": ["<|user|>"]}
    (directory / "special_tokens_map.json").write_text(json.dumps(names))
    return directory


def sharded(directory: Path) -> Path:
    """Save the same with an index and two or more shards."""
    foreign(directory)
    model = load_causal(str(directory)).model
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="12KB")
    return directory


def tuned(directory: Path, base: Path, *, rank: int) -> Path:
    """Save a model with dials: full weights, or an adapter on ``base``."""
    policy = load_causal(str(base))
    model: Any = policy.model
    manifest = install(
        model, policy.tokenizer, attributes=ATTRIBUTES, levels=3, base_model_hash=policy.hash
    )
    if rank:
        model = add_lora(model, manifest, rank=rank, seed=0)
    save_dial_model(model, policy.tokenizer, manifest, directory)
    (directory / "README.md").write_text("# A model\n")
    return directory


def adapter(directory: Path, base: Path) -> Path:
    """Save a plain adapter, as anybody would."""
    from peft import LoraConfig, get_peft_model

    policy = load_causal(str(base))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    get_peft_model(policy.model, config).save_pretrained(str(directory))
    policy.tokenizer.save_pretrained(directory)
    return directory


def reward(directory: Path) -> Path:
    """Save a reward model."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    fast = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**sizes(len(fast), num_labels=1, pad_token_id=1, num_hidden_layers=1))
    LlamaForSequenceClassification(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def changes(directory: Path, n: int, *, seed: int) -> list[Change]:
    """Return n changes of a directory, the same for the same files, kinds and files in turn."""
    draw = random.Random(seed)
    files = sorted(file.name for file in directory.iterdir())
    slots = [(file, kind) for file in files for kind in FILE_KINDS]
    slots += [
        (file, kind)
        for file in files
        if file.endswith((".json", ".safetensors"))
        for kind in JSON_KINDS
        for _ in range(4)
    ]
    found: dict[str, Change] = {}
    while len(found) < n:
        draw.shuffle(slots)
        for file, kind in slots:
            change = _change(directory, file, kind, files, draw)
            found.setdefault(f"{file} {change.what}", change)
    return list(found.values())[:n]


def _change(
    directory: Path, file: str, kind: str, files: Sequence[str], draw: random.Random
) -> Change:
    if kind in JSON_KINDS:
        return _json_change(directory, file, kind, draw)
    other = draw.choice([name for name in files if name != file])

    def apply(place: Path) -> None:
        path = place / file
        content = path.read_bytes()
        if kind == "renamed":
            path.rename(place / f"{file}.old")
        else:
            path.write_bytes(
                {
                    "cut": content[: len(content) // 2],
                    "emptied": b"",
                    "swapped": (directory / other).read_bytes(),
                    "pointer": LFS.encode(),
                }[kind]
            )

    return Change(file, kind, f"{kind} {other if kind == 'swapped' else ''}".strip(), apply)


def _json_change(directory: Path, file: str, kind: str, draw: random.Random) -> Change:
    plain = _read(directory / file)
    path = draw.choice(list(_paths(plain)))
    before = plain
    for key in path:
        before = before[key]
    values = RETYPED if kind == "retyped" else EDGES
    value = draw.choice([one for one in values if json.dumps(one) != json.dumps(before)])

    def apply(place: Path) -> None:
        edited = _read(place / file)
        owner = edited
        for key in path[:-1]:
            owner = owner[key]
        if kind == "removed":
            del owner[path[-1]]
        else:
            owner[path[-1]] = value
        _write(place / file, edited)

    to = "" if kind == "removed" else f" to {json.dumps(value)}"
    return Change(file, kind, f"{kind}: {'.'.join(map(str, path))}{to}", apply)


def _paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value; of long lists and tables the first few."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, inner in items if len(items) < 40 else items[:3]:
        yield (*before, key)
        if isinstance(inner, dict | list):
            yield from _paths(inner, (*before, key))


def _read(file: Path) -> Any:
    """Return the JSON of a file, or of the header of a weights file."""
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return json.loads(data)
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _write(file: Path, plain: Any) -> None:
    text = json.dumps(plain).encode()
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        rest = data[8 + int.from_bytes(data[:8], "little") :]
        text = len(text).to_bytes(8, "little") + text + rest
    file.write_bytes(text)


def verdict(place: Path, use: Callable[[Path], None]) -> str:
    """Return ``refused`` or ``loaded``; whatever else is raised is the fault that is looked for."""
    try:
        use(place)
    except EquipoiseError as error:
        if not (error.what and error.why and error.fix):
            raise AssertionError("an error without cause or cure") from error
        return "refused"
    return "loaded"


def use_policy(place: Path) -> None:
    """Load a policy, hold its weights against the file, and sample three tokens."""
    policy = load_causal(str(place), device="cpu")
    check_weights_are_stored(place, policy.model)
    sample(policy)


def use_reward(place: Path) -> None:
    """Load a reward model, hold its weights against the file, and score two answers."""
    from equipoise.config import RewardModelConfig
    from equipoise.rewards.load import load_reward_model
    from equipoise.types import Prompt

    model: Any = load_reward_model(
        RewardModelConfig(model=str(place)), attribute="safety", device="cpu"
    )
    check_weights_are_stored(place, model.model)
    prompt = Prompt("p", (Message("user", "hi"),), "train")
    model.score([(prompt, "a"), (prompt, "a longer one")])


def sample(policy: LoadedPolicy) -> None:
    """Sample three tokens."""
    ids = tuple(policy.encoder.prompt_ids((Message("user", "hi"),)))
    engine = TransformersEngine.of(policy)
    request = GenerationRequest(ids, (Branch((), 1),))
    engine.generate([request], Sampling(top_k=0, max_tokens=3))


def check_weights_are_stored(place: Path, model: Any) -> None:
    """Assert that every weight is one that stands in a file under its name."""
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for folder in (place, *map(Path, {c.base_model_name_or_path for c in _adapters(model)})):
        for file in folder.glob("*.safetensors"):
            stored |= load_file(file)
    for name, weight in model.named_parameters():
        own = name.replace(".default", "").replace(".base_layer", "")
        found = stored.get(own, stored.get(own.removeprefix("base_model.model.")))
        if found is None or not torch.equal(found.float(), weight):
            raise AssertionError(f"{name} is not what the file holds")


def _adapters(model: Any) -> list[Any]:
    return list(getattr(model, "peft_config", {}).values())


def trial(
    directory: Path, found: Sequence[Change], use: Callable[[Path], None], work: Path
) -> list[tuple[Change, str]]:
    """Return what became of every change; ``raw: ...`` where something unclear was raised."""
    results = []
    for number, change in enumerate(found):
        place = work / str(number)
        shutil.copytree(directory, place)
        change.apply(place)
        try:
            result = verdict(place, use)
        except Exception as error:  # looked for: an error that names neither cause nor cure
            result = f"raw: {type(error).__name__}: {error}"
        results.append((change, result))
        shutil.rmtree(place)
    return results


def hashed(directory: Path) -> set[str]:
    """Return the files that decide what a model does."""
    return set(file_hashes(directory))


def count(results: Sequence[tuple[Change, str]]) -> dict[str, Any]:
    """Return the numbers of a trial, by kind of change."""
    kinds: dict[str, Counter[str]] = {}
    for change, result in results:
        name = "unused" if result == "loaded" and change.file in UNUSED else result
        kinds.setdefault(change.kind, Counter())[name.partition(":")[0]] += 1
    total = sum(kinds.values(), Counter[str]())
    return {
        "n": len(results),
        **{name: total[name] for name in ("refused", "unused", "loaded", "raw")},
        "kinds": {name: dict(sorted(kinds[name].items())) for name in sorted(kinds)},
    }


def directories(root: Path) -> dict[str, Kept]:
    """Make the model directories: name to (place, number of changes, how it is used)."""
    base = foreign(root / "base")
    made: list[Kept] = [
        (tuned(root / "full", base, rank=0), N_CHANGES, use_dials),
        (tuned(root / "lora", base, rank=2), N_CHANGES, use_dials),
        (foreign(root / "foreign"), N_CHANGES, use_policy),
        (sharded(root / "shards"), 70, use_policy),
        (adapter(root / "adapter", base), 70, use_policy),
        (reward(root / "reward"), 70, use_reward),
    ]
    return dict(zip(NAMES, made, strict=True))


def use_dials(place: Path) -> None:
    """Load a tuned directory."""
    load_causal(str(place), device="cpu")


def main() -> None:
    """Damage, load, count; write the table."""
    torch.set_num_threads(1)
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (place, n, use) in directories(Path(folder)).items():
            results = trial(place, changes(place, n, seed=0), use, Path(folder) / "work")
            table[name] = count(results)
            for change, result in results:
                if result.startswith("raw") or "-v" in sys.argv:
                    print(f"{name}: {change.file} {change.what}: {result}")
            print(name, {key: table[name][key] for key in ("n", "refused", "unused", "loaded")})
    OUT.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
