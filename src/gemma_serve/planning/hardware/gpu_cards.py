"""GPUs that needn't be here: `h200`, `l4x2` or `24GiB`, as `--for-gpu` takes them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gemma_serve.errors import UsageError
from gemma_serve.planning.hardware.gpus import Gpu

CardSource = Literal["measured", "nominal"]

MOST_GPUS = 64
LARGEST_CARD_BYTES = 2**40
# What a card of which only the size is said is taken to be: the oldest that runs bfloat16.
ASSUMED_CAPABILITY = (8, 0)

_MIB = 2**20
_UNITS = {"g": 2**30, "m": _MIB}
_SIZE = re.compile(r"([0-9]{1,7}(?:\.[0-9]{1,3})?)([gm])i?b?")
_COUNTED = re.compile(r"(?P<card>.+)x(?P<count>[0-9]+)")
_COUNT_FIRST = re.compile(r"(?P<count>[0-9]+)x(?P<card>.+)")
_EXAMPLES = "`--for-gpu h200`, `--for-gpu l4x2` or `--for-gpu 24GiB`"


@dataclass(frozen=True)
class GpuCard:
    """A card by name, as `data/gpu_cards.yaml` lists it.

    `total_bytes` is what CUDA can give out on an empty card; `source` says whether it was read
    from such a card or follows from the data sheet. `bandwidth` is in bytes per second,
    `bf16_flops` in operations per second, each None where not certain. `common_for` holds names
    that fit several cards, of which this is the commonest. `refused` says why vLLM won't run on
    the card, and is empty where it does. `unified` memory is shared with the CPU.
    """

    key: str
    name: str
    total_bytes: int
    compute_capability: tuple[int, int]
    source: CardSource
    bandwidth: float | None = None
    bf16_flops: float | None = None
    aliases: tuple[str, ...] = ()
    common_for: tuple[str, ...] = ()
    refused: str = ""
    unified: bool = False

    @property
    def spellings(self) -> frozenset[str]:
        """Every name that means this card, as `_plain` leaves it."""
        return frozenset(
            _plain(name) for name in (self.key, self.name, *self.aliases, *self.common_for)
        )


@dataclass(frozen=True)
class ForGpu:
    """`count` empty GPUs of one kind to plan for; `notes` say what had to be assumed.

    `name` is the card's full name, or "24 GiB GPU" where only a size was given; `card` is None
    then.
    """

    name: str
    count: int
    total_bytes: int
    compute_capability: tuple[int, int]
    card: GpuCard | None = None
    notes: tuple[str, ...] = ()

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs as NVML would report them on a machine that has nothing else to do."""
        return tuple(
            Gpu(
                index=index,
                uuid="",
                pci_bus_id="",
                name=self.name,
                total_bytes=self.total_bytes,
                used_bytes=0,
                free_bytes=self.total_bytes,
                compute_capability=self.compute_capability,
            )
            for index in range(self.count)
        )


def read_card(entry: Mapping[str, Any]) -> GpuCard:
    """A card from its entry in `data/gpu_cards.yaml`.

    Raises KeyError or TypeError for an entry without a needed key, or with an unknown one.
    """
    rest = dict(entry)
    major, minor = rest.pop("capability")
    bandwidth, flops = rest.pop("gb_s", None), rest.pop("tflops", None)
    return GpuCard(
        total_bytes=rest.pop("total_mib") * _MIB,
        compute_capability=(major, minor),
        bandwidth=bandwidth * 1e9 if bandwidth else None,
        bf16_flops=flops * 1e12 if flops else None,
        aliases=tuple(rest.pop("aliases", ())),
        common_for=tuple(rest.pop("common_for", ())),
        **rest,
    )


def parse_for_gpu(text: str, cards: Sequence[GpuCard], *, count: int = 1) -> ForGpu:
    """The GPUs that `text` names: a card, a full name, or a size, with a count if wanted.

    `h200`, `H100 80GB HBM3`, `l4x2`, `2xl4`, `24GiB`, `24gx4`. A size is taken whole, in GiB
    whether written g, GB or GiB, as makers of cards do. Where `text` gives no number, there are
    `count` of them. Raises UsageError for anything else.
    """
    found = _one_kind(text, cards)
    if found is not None:
        return replace(found, count=min(count, MOST_GPUS))
    for pattern in (_COUNTED, _COUNT_FIRST):
        match = pattern.fullmatch(_bare(text))
        kind = _one_kind(match["card"], cards) if match else None
        if match and kind is not None:
            return _counted(kind, match["count"])
    raise _unknown(text, cards)


def _one_kind(text: str, cards: Iterable[GpuCard]) -> ForGpu | None:
    size = _SIZE.fullmatch(_bare(text))
    if size is not None:
        return _of_size(text, float(size[1]) * _UNITS[size[2]])
    plain = _plain(text)
    card = next((card for card in cards if plain in card.spellings), None)
    if card is None:
        return None
    return ForGpu(
        name=card.name,
        count=1,
        total_bytes=card.total_bytes,
        compute_capability=card.compute_capability,
        card=card,
        notes=tuple(_card_notes(plain, text, card)),
    )


def _card_notes(plain: str, text: str, card: GpuCard) -> Iterable[str]:
    if plain in map(_plain, card.common_for):
        yield f"{text.strip()} comes in several kinds, and {card.name} is taken"
    if card.refused:
        yield f"vLLM won't run on {card.name}: {card.refused}"
    if card.unified:
        yield f"{card.name} shares its memory with the CPU, which takes some of it too"


def _of_size(text: str, size: float) -> ForGpu:
    total = int(size)
    if not _UNITS["g"] <= total <= LARGEST_CARD_BYTES:
        raise UsageError(
            f"--for-gpu names a GPU of {text.strip()}, but cards have 1 to "
            f"{LARGEST_CARD_BYTES // _UNITS['g']} GiB",
            code="gpu.card_size",
            hint=f"say {_EXAMPLES}",
        )
    gib = f"{total / _UNITS['g']:.4g} GiB"
    major, minor = ASSUMED_CAPABILITY
    note = (
        f"all of {gib} is taken as free to use, and compute capability {major}.{minor} as the "
        f"card's; a real one keeps some memory to itself, so name it if you can"
    )
    return ForGpu(f"{gib} GPU", 1, total, ASSUMED_CAPABILITY, notes=(note,))


def _counted(kind: ForGpu, count: str) -> ForGpu:
    # Longer ones aren't read, since Python refuses to make thousands of digits a number.
    number = int(count) if len(count.lstrip("0")) < 4 else MOST_GPUS + 1
    if not 1 <= number <= MOST_GPUS:
        raise UsageError(
            f"--for-gpu asks for {_short(count)} of {kind.name}, but one engine runs on 1 to "
            f"{MOST_GPUS} GPUs",
            code="gpu.card_count",
            hint=f"say {_EXAMPLES}",
        )
    return ForGpu(
        kind.name, number, kind.total_bytes, kind.compute_capability, kind.card, kind.notes
    )


def _unknown(text: str, cards: Sequence[GpuCard]) -> UsageError:
    what = f"`{_short(text.strip())}`" if text.strip() else "nothing"
    near = _nearest_keys(text, cards)
    hint = f"say {_EXAMPLES}"
    if re.fullmatch(r"[0-9]{1,4}", _bare(text)):
        hint = f"a size wants its unit: `--for-gpu {_bare(text)}GiB`"
    if near:
        names = ", ".join(f"`{key}`" for key in near)
        hint = f"did you mean {names}? Or give its memory: `--for-gpu 24GiB`"
    return UsageError(
        f"--for-gpu names {what}, which is no card that gemma-serve knows and no size of one",
        code="gpu.card_unknown",
        hint=hint,
    )


def _nearest_keys(text: str, cards: Iterable[GpuCard]) -> list[str]:
    """The keys of at most four cards that a mistyped name may have meant, best first."""
    wanted = re.sub(r"x[0-9]{1,2}$", "", _plain(text))[:40]
    keys = {name: card.key for card in cards for name in sorted(card.spellings)}
    close = difflib.get_close_matches(wanted, keys, n=12, cutoff=0.6)
    return list(dict.fromkeys(keys[name] for name in close))[:4]


def _bare(text: str) -> str:
    return "".join(text.lower().split())


def _plain(text: str) -> str:
    """A name without what people write in many ways: case, blanks, hyphens, the maker's name."""
    return re.sub(r"[-_]|nvidia|geforce|tesla", "", _bare(text))


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
