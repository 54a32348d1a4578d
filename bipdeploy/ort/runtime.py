"""Running an ONNX folder: logits, prompts, single steps, generation.

Tensors are PyTorch's, on the session's device, and onnxruntime reads and writes them where they
lie: that serves every type, and nothing is copied. Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import InputError
from bipdeploy.ort import folder as onnx_folder
from bipdeploy.ort.binding import Binding
from bipdeploy.ort.sampling import Sampling
from bipdeploy.ort.session import check_version, device_for, open_session


@dataclass
class Cache:
    """Keys and values of B rows so far.

    buffers: one set, or two that take turns, of a flat tensor for each key and value; room: steps
    that may follow; lengths: real tokens of each row [B]; mask: as the graph last saw it.
    """

    binding: Binding
    buffers: list[list[torch.Tensor]]
    room: int
    lengths: torch.Tensor
    mask: torch.Tensor


class OnnxModel:
    """A model in an ONNX folder.

    `device`: "cpu", "cuda", or "auto" for CUDA where it can be; `threads`: on the CPU, None leaves
    it to onnxruntime. Raises InputError where the folder is not whole or cannot be run there.
    A graph is opened when it is first needed: `logits` uses one, generating the other.
    """

    def __init__(self, folder: Path | str, device: str = "auto", threads: int | None = None):
        self.folder, self.threads = Path(folder), threads
        self.contents = onnx_folder.read(folder)
        check_version(self.contents)
        self.device = device_for(device, self.contents)
        self.dtype: torch.dtype = getattr(torch, self.contents.dtype)
        self.max_positions = self.contents.max_positions

    @cached_property
    def _full(self) -> Any:
        return open_session(self.folder / onnx_folder.MODEL, self.device, self.threads)

    @cached_property
    def _last(self) -> Any:
        return open_session(self.folder / onnx_folder.LAST, self.device, self.threads)

    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, V] in float32 for token ids [B, T]; of no meaning where `mask` [B, T] is 0.
        """
        packed, lengths, order = self._packed(ids, mask, 0)
        rows, tokens = packed.shape
        out = self._empty(rows, tokens, self.contents.vocabulary)
        binding = Binding(self._full, self.device)
        binding.input("input_ids", packed)
        binding.input("attention_mask", self._real(lengths, tokens))
        nothing = [self._empty(rows, heads, 0, self.contents.head_dim)
                   for heads in self._cached_heads()]
        self._bind_caches(binding, nothing, [])
        binding.output("logits", out)
        binding.run()
        if mask is None:
            return out.float()
        placed = torch.zeros(*ids.shape, self.contents.vocabulary, device=self.device)
        placed[torch.arange(rows, device=self.device)[:, None], order[:, :tokens]] = out.float()
        return placed

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None = None, room: int = 1
                ) -> tuple[torch.Tensor, Cache]:
        """Read prompts [B, T]: logits [B, V] in float32 for the token after each, and the cache.

        `room`: how many steps may follow. Padding, where `mask` is 0, may be on either side.
        """
        packed, lengths, _ = self._packed(ids, mask, room)
        rows, tokens = packed.shape
        size = rows * (tokens + room) * self.contents.head_dim
        buffers = [[torch.zeros(size * heads, dtype=self.dtype, device=self.device)
                    for heads in self._cached_heads()] for _ in range(1 if self._shared else 2)]
        cache = Cache(Binding(self._last, self.device), buffers, room, lengths,
                      self._real(lengths, tokens))
        if self._shared:
            views = self._views(buffers[0], rows, tokens + room)
            self._bind_caches(cache.binding, views, views)
        return self._advance(packed, cache, past=0), cache

    def step(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Append one token to each row [B]: logits [B, V] in float32 for the next."""
        if not cache.room:
            raise InputError("the cache is full; give prefill more room")
        past = cache.mask.shape[1]
        cache.room -= 1
        cache.lengths = cache.lengths + 1
        if self._shared:  # each row grows from its own length
            cache.mask = self._real(cache.lengths, past + 1)
        else:
            cache.mask = torch.nn.functional.pad(cache.mask, (0, 1), value=1)
        return self._advance(tokens.to(self.device, torch.int64)[:, None].contiguous(), cache, past)

    def generate(self, ids: torch.Tensor, new_tokens: int, *, mask: torch.Tensor | None = None,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 seed: int | None = None, stop: Collection[int] = (),
                 on_token: Callable[[torch.Tensor], None] = lambda _: None) -> torch.Tensor:
        """Continue prompts [B, T] by up to `new_tokens` tokens: [B, new], on the CPU.

        Temperature 0 is greedy. A row that has said a token of `stop` repeats it until all rows
        have. `on_token` is called with the tokens [B] of every step.
        """
        if new_tokens < 1:
            raise InputError(f"new_tokens is {new_tokens}; give 1 or more")
        sampling = Sampling(temperature, top_k, top_p)
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        ends = torch.tensor(sorted(stop), dtype=torch.long)
        logits, cache = self.prefill(ids, mask, new_tokens)
        said: list[torch.Tensor] = []
        ended = torch.zeros(len(logits), dtype=torch.bool)
        while True:
            tokens = sampling.choose(logits, generator).cpu()
            if said:
                tokens = tokens.where(~ended, said[-1])
            ended |= torch.isin(tokens, ends)
            said.append(tokens)
            on_token(tokens)
            if len(said) == new_tokens or ended.all():
                return torch.stack(said, 1)
            logits = self.step(tokens, cache)

    @property
    def _shared(self) -> bool:
        """Whether the graph writes new keys and values into the buffer of the old ones."""
        return self.contents.style == "gqa"

    def _cached_heads(self) -> list[int]:
        """KV heads of each cache, for its key and for its value."""
        return [heads for heads in self.contents.kv_heads for _ in range(2)]

    def _packed(self, ids: torch.Tensor, mask: torch.Tensor | None, new_tokens: int
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids [B, T] with all padding on the right, the rows' lengths, and from which column each
        token came. Raises InputError for ids that the model cannot read."""
        if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
            raise InputError(f"token ids must be whole numbers [rows, tokens], at least one; these "
                             f"are {ids.dtype} {list(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.contents.vocabulary:
            raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of "
                             f"{self.contents.vocabulary}; this tokenizer is another model's")
        ids = ids.to(self.device, torch.int64)
        if mask is None:
            mask = torch.ones_like(ids)
        elif mask.shape != ids.shape:
            raise InputError(f"mask has the shape {list(mask.shape)}, and the ids have "
                             f"{list(ids.shape)}; give one number per token")
        real = mask.to(self.device) != 0
        lengths = real.sum(1)
        if not lengths.min():
            raise InputError(f"row {int(lengths.argmin())} is all padding; give it a token")
        longest = int(lengths.max())
        if longest + new_tokens > self.max_positions:
            more = f" and {new_tokens} to follow" if new_tokens else ""
            raise InputError(f"{longest} tokens{more} pass the model's maximum of "
                             f"{self.max_positions}; shorten the prompt or lower new_tokens")
        order = real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        return ids.gather(1, order)[:, :longest].contiguous(), lengths, order

    def _real(self, lengths: torch.Tensor, columns: int) -> torch.Tensor:
        """The mask [B, columns] of right-padded rows."""
        return (torch.arange(columns, device=self.device) < lengths[:, None]).long()

    def _advance(self, ids: torch.Tensor, cache: Cache, past: int) -> torch.Tensor:
        rows = len(ids)
        logits = self._empty(rows, 1, self.contents.vocabulary)
        cache.binding.input("input_ids", ids)
        cache.binding.input("attention_mask", cache.mask)
        cache.binding.output("logits", logits)
        if not self._shared:
            old, new = cache.buffers
            self._bind_caches(cache.binding, self._views(old, rows, past),
                              self._views(new, rows, past + ids.shape[1]))
            cache.buffers = [new, old]
        cache.binding.run()
        return logits[:, 0].float()

    def _views(self, buffers: Sequence[torch.Tensor], rows: int, columns: int
               ) -> list[torch.Tensor]:
        """The fronts of flat buffers as caches [rows, KV heads, columns, head_dim]."""
        shapes = [(rows, heads, columns, self.contents.head_dim) for heads in self._cached_heads()]
        return [flat[:math.prod(shape)].view(shape)
                for flat, shape in zip(buffers, shapes, strict=True)]

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _bind_caches(self, binding: Binding, past: Sequence[torch.Tensor],
                     present: Sequence[torch.Tensor]) -> None:
        names = [f"{number}.{part}" for number in range(len(self.contents.kv_heads))
                 for part in ("key", "value")]
        for name, tensor in zip(names, past, strict=True):
            binding.input(f"past_key_values.{name}", tensor)
        for name, tensor in zip(names, present, strict=False):
            binding.output(f"present.{name}", tensor)
