"""What each width of each part of a block costs the model's output, one part at a time.

A part is a block's heads or its FFN. It is cut to a few widths, its output projection is refitted
to what the whole one gave, and the change of the next-token distributions is taken as the mean
Kullback-Leibler divergence from the dense ones, in nats per token. It is judged on windows that
the refit has not seen: a refit is nearly free on those that it was fitted to.

`measured` lets every variant run through the rest of the model: exact, and as each block's variants
pass all later blocks, its cost grows with the square of the number of blocks. `sensitivity`
estimates the same from one walk back (`sensed`): its cost grows with the number of blocks.

Shapes: B windows in a batch, T tokens, N tokens of all windows, D hidden size, K inputs of a
projection, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bipdeploy.model import finite
from bipdeploy.model.activations import Batches, Keep, replace
from bipdeploy.model.blocks import Block, BlockWalker
from bipdeploy.model.families import BlockWidths, Heads, Width
from bipdeploy.pruning.kept import BlockScores
from bipdeploy.pruning.kept import keep as best
from bipdeploy.pruning.refit import RidgeProblem, best_ridge
from bipdeploy.pruning.search import Curve
from bipdeploy.pruning.slicing import expand

Widths = Callable[[int, str], Sequence[Width]]


@dataclass(frozen=True)
class Text:
    """Batches of windows [B, T]: those that divergences are of, and those that refits see.

    `ridge`: of the refits, None for none; `auto` chooses one for each part, with which a refit at
    half its width fits the last `held` of the fitted batches best.
    """

    judged: list[torch.Tensor]
    fitted: list[torch.Tensor]
    ridge: float | Literal["auto"] | None
    held: int = 0

    @property
    def batches(self) -> list[torch.Tensor]:
        """All of them; without a refit the judged ones alone."""
        return self.judged if self.ridge is None else [*self.judged, *self.fitted]

    @property
    def length(self) -> int:
        return self.judged[0].shape[1]


@torch.no_grad()
def measured(walker: BlockWalker, text: Text, scores: Sequence[BlockScores], widths: Widths,
             advance: Callable[[], None] = lambda: None, keep: Keep = list) -> list[Curve]:
    """The curves of every part; `widths(block, part)` says at which widths.

    One walk: each variant joins at its block and is carried through all later ones, so that
    every block is loaded once. The dense width costs nothing and is not carried.
    """
    curves: list[Curve] = []
    count = len(text.judged)
    dense = walker.embed(text.batches, keep)
    carried: list[tuple[Curve, Width, Batches]] = []
    for index, block in enumerate(walker.blocks(text.length)):
        for _, _, hidden in carried:
            replace(hidden, block)
        u_dense = dense
        if block.has_attention:
            part = Part(walker, index, "heads", block.output, scores[index], text)
            curves.append(curve := Curve(index, "heads", list(widths(index, "heads"))))
            z = keep(block.attention(x).z for x in dense)
            for number in range(count, len(z)):
                part.fit(z[number])
            for width in part.below(curve.widths):
                reduced = part.reduced(width)
                carried.append((curve, width, keep(
                    u + block.ffn(u) if block.has_ffn else u
                    for u in (dense[i] + reduced(z[i]) for i in range(count)))))
            u_dense = keep(x + block.output(own) for x, own in zip(dense, z, strict=True))
            del z
        dense = u_dense
        if block.has_ffn:
            part = Part(walker, index, "ffn", block.down, scores[index], text)
            curves.append(curve := Curve(index, "ffn", list(widths(index, "ffn"))))
            h = keep(gate * up for gate, up in map(block.ffn_parts, u_dense))
            for number in range(count, len(h)):
                part.fit(h[number])
            for width in part.below(curve.widths):
                reduced = part.reduced(width)
                carried.append((curve, width, keep(
                    u_dense[i] + reduced(h[i]) for i in range(count))))
            dense = keep(u + block.down(own) for u, own in zip(u_dense, h, strict=True))
            del h
        del block  # the walk reads the next but one now
        advance()
    head = walker.head()
    totals = [0.0] * len(carried)
    for number in range(count):
        expected = head(dense[number]).float().log_softmax(-1)
        for variant, (_, _, hidden) in enumerate(carried):
            totals[variant] += divergence(head(hidden[number]).float().log_softmax(-1), expected)
    found = {(curve.block, curve.part, width): total
             for (curve, width, _), total in zip(carried, totals, strict=True)}
    return _filled(walker, text, curves, found)


@torch.no_grad()
def sensed(walker: BlockWalker, text: Text, scores: Sequence[BlockScores], widths: Widths,
           seed: int, advance: Callable[[], None] = lambda: None, keep: Keep = list, *,
           draws: int = 1) -> list[Curve]:
    """The same by LLM-BIP's idea, carried from a block's output to the model's.

    For a small error e of a part's output the divergence is half its square in the Fisher metric.
    With labels drawn from the dense model's own distribution and g the gradient of their summed
    log-probability by that output, that is the mean over draws of half the square of g . e. The
    squares are taken token by token, which leaves out what errors of different tokens have in
    common, and with it most of the noise of few draws. One walk forwards, which keeps the input of
    every block, and one back; a variant costs its own product.
    """
    found: dict[tuple[int, str, Width], float] = {}
    curves: list[Curve] = []
    for index, block, fitted, sensings in backwards(walker, text, seed, advance, keep, draws):
        projections = {name: block.output if name == "heads" else block.down for name in sensings}
        parts = {name: Part(walker, index, name, projection, scores[index], text)
                 for name, projection in projections.items()}
        for x in fitted:
            u = x
            if block.has_attention:
                attended = block.attention(x)
                u = attended.u
                parts["heads"].fit(attended.z)
            if block.has_ffn:
                gate, up = block.ffn_parts(u)
                parts["ffn"].fit(gate * up)
        for name, part in sorted(parts.items()):  # from the last to the first here too
            projection = projections[name]
            curves.append(curve := Curve(index, name, list(widths(index, name))))
            for width in part.below(curve.widths):
                reduced, total = part.reduced(width), 0.0
                for inputs, gradients in sensings[name]:
                    error = reduced(inputs) - projection(inputs)
                    total += sum(fisher(g, error) for g in gradients) / len(gradients)
                found[index, name, width] = total
        del block
        advance()
    return _filled(walker, text, curves[::-1], found)


def backwards(walker: BlockWalker, text: Text, seed: int,
              advance: Callable[[], None] = lambda: None, keep: Keep = list, draws: int = 1
              ) -> Iterator[tuple[int, Block, Iterator[torch.Tensor],
                                  dict[str, list[tuple[torch.Tensor, list[torch.Tensor]]]]]]:
    """Every block from the last to the first: its index, itself, its inputs [B, T, D] on the fitted
    windows, and by part (heads, ffn) for each judged batch the inputs of its projection [B, T, K]
    with the gradients [B, T, D] by the projection's output, one per draw."""
    count = len(text.judged)
    hidden, inputs = walker.embed(text.batches, keep), []
    for block in walker.blocks(text.length):
        inputs.append(keep(x.cpu() for x in hidden))
        replace(hidden, block)
        del block
        advance()
    head, generator = walker.head(), torch.Generator().manual_seed(seed)
    upstream = [_drawn(head, hidden[number], generator, draws) for number in range(count)]
    del hidden, head
    for index in reversed(range(len(walker))):
        block, batches = walker.block(index, text.length), inputs.pop()
        sensings: dict[str, list[tuple[torch.Tensor, list[torch.Tensor]]]] = {}
        for number in range(count):
            upstream[number] = _through(block, batches[number].to(walker.device),
                                        upstream[number], sensings)
        fitted = (batches[i].to(walker.device) for i in range(count, len(batches)))
        yield index, block, fitted, sensings


def _drawn(head: torch.nn.Module, y: torch.Tensor, generator: torch.Generator, draws: int
           ) -> list[torch.Tensor]:
    """Gradients by y [B, T, D] of the summed log-probability of labels drawn at every token."""
    found: list[list[torch.Tensor]] = [[] for _ in range(draws)]
    for window in y.detach().split(1):  # the logits of one at a time: vocabularies are large
        window.requires_grad_()
        with torch.enable_grad():
            logs = head(window).float().log_softmax(-1)[0]
        for gradients in found:
            labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
            with torch.enable_grad():
                loss = logs.gather(1, labels.to(logs.device)).sum()
            gradients.append(torch.autograd.grad(loss, window, retain_graph=True)[0])
    return [torch.cat(gradients) for gradients in found]


def _through(block: Block, x: torch.Tensor, upstream: list[torch.Tensor],
             sensings: dict[str, list[tuple[torch.Tensor, list[torch.Tensor]]]]
             ) -> list[torch.Tensor]:
    """Gradients by a block's input; adds what the outputs of its two projections are sensed by."""
    for parameter in block.layer.parameters():
        parameter.requires_grad_(False)
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        z, u = None, x
        if block.has_attention:
            attended = block.attention(x)
            z, u = attended.z, attended.u
        y, h = u, None
        if block.has_ffn:
            gate, up = block.ffn_parts(u)
            h = gate * up
            y = u + block.down(h)
    if h is not None:
        sensings.setdefault("ffn", []).append((h.detach(), upstream))
    if y is x:
        return upstream
    found = [torch.autograd.grad(y, [x, u], g, retain_graph=True) for g in upstream]
    if z is not None:
        sensings.setdefault("heads", []).append((z.detach(), [at_u for _, at_u in found]))
    return [at_x for at_x, _ in found]


def fisher(gradient: torch.Tensor, error: torch.Tensor) -> float:
    """Half the squares of g . e over D, summed over tokens; both [.., D]."""
    along = (gradient.detach().float() * error.detach().float()).sum(-1)
    return 0.5 * float(along.double().square().sum())


class Part:
    """A block's heads or FFN, cut to widths: one sum of its inputs serves the refit of all."""

    def __init__(self, walker: BlockWalker, index: int, name: str, projection: torch.nn.Linear,
                 scores: BlockScores, text: Text):
        own = walker.architecture.blocks[index]
        self.dense = own.of(name)
        self._group, self._head_dim = own.group, walker.architecture.head_dim
        self._projection, self._scores = projection, scores
        self._ridge, self._unheld = text.ridge, len(text.fitted) - text.held
        self._problem = RidgeProblem(projection.weight) if text.ridge is not None else None
        self._held = RidgeProblem(projection.weight) if text.held else None

    def below(self, widths: Sequence[Width]) -> list[Width]:
        """The widths that are not the dense one."""
        return [width for width in widths if width != self.dense]

    def fit(self, inputs: torch.Tensor) -> None:
        """Take in the projection's inputs [B, T, K] on the next of the batches that refits see."""
        if self._problem is None:
            return
        problem = self._problem if self._unheld > 0 or self._held is None else self._held
        problem.see(inputs, torch.nn.functional.linear(inputs, self._projection.weight))
        self._unheld -= 1

    def reduced(self, width: Width) -> Callable[[torch.Tensor], torch.Tensor]:
        """What the projection gives from its best inputs, refitted to what it gave from all."""
        if width in (0, Heads(0, 0)):
            return lambda z: z.new_zeros((*z.shape[:-1], self._projection.out_features))
        columns, weight = self._columns(width), self._projection.weight
        if self._problem is None:
            weight = weight[:, columns]
        else:
            ridge = self._chosen_ridge(self._problem)
            weight = self._problem.restricted(columns).solve(ridge).to(weight.dtype)
        bias = self._projection.bias
        return lambda z: torch.nn.functional.linear(z[..., columns], weight, bias)

    def _columns(self, width: Width) -> torch.Tensor:
        """The inputs that stay at a width."""
        kept = best(self._scores, BlockWidths(0, 0, 0).having(width))
        columns = (expand(kept.query_heads(self._group), self._head_dim)
                   if isinstance(width, Heads) else expand(kept.channels, 1))
        return columns.to(self._projection.weight.device)

    def _chosen_ridge(self, problem: RidgeProblem) -> float:
        """The ridge of all refits, chosen at the first; they are then fitted to all batches."""
        if self._held is not None:
            columns = self._columns(_half(self.dense))
            self._ridge = best_ridge(problem.restricted(columns), self._held.restricted(columns))
            problem.absorb(self._held)
            self._held = None
        assert self._ridge is not None and self._ridge != "auto"
        return self._ridge


def _half(width: Width) -> Width:
    if isinstance(width, Heads):
        return (Heads(width.kv // 2, width.queries) if width.kv > 1 else
                Heads(1, max(width.queries // 2, 1)))
    return max(width // 2, 1)


def divergence(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Kullback-Leibler divergence of log-probabilities from the expected ones, summed over
    tokens, nats."""
    return float((expected.exp() * (expected - found)).sum(dtype=torch.float64))


def _filled(walker: BlockWalker, text: Text, curves: list[Curve],
            found: dict[tuple[int, str, Width], float]) -> list[Curve]:
    """The curves with what was found, per token; a width that was not tried is the dense one."""
    tokens = sum(batch.numel() for batch in text.judged)
    for curve in curves:
        totals = [found.get((curve.block, curve.part, width), 0.0) for width in curve.widths]
        finite.require(f"divergences of block {curve.block}'s {curve.part}", totals, walker.dtype)
        curve.divergences.extend(total / tokens for total in totals)
    return curves
