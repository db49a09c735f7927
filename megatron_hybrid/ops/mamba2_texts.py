"""The core of a Mamba-2 mixer over parts of many texts at once, whose lengths differ.

Texts of about the same length go through the scan side by side, a chunk of each in one block. The
tokens that fill up a chunk have a step of zero: they neither decay a state nor add to it.

Shapes: T tokens of all b texts, one text after the other; K texts side by side in chunks of Q
tokens; h heads of p channels in g groups of r = h / g, n state, k taps, d = h*p, c = d + 2*g*n
convolved channels, w = 2d + 2gn + h.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.ops.mamba2_fused import Core, Inputs
from megatron_hybrid.ops.mamba2_states import CoreParameters, mamba2_chunk
from megatron_hybrid.ops.ssd.block import BLOCK_ELEMENTS_A_THREAD, CHUNK_TOKENS, Block
from megatron_hybrid.ops.ssd.buffers import WORKSPACE
from megatron_hybrid.ops.ssd.steps import BlockShape


@dataclass(frozen=True)
class _Group:
    """Texts that go side by side, the longest first.

    Attributes:
        texts, number: their numbers, as a list and as a tensor.
        lengths, starts: of each, `[K, 1]` int64.
        shapes: the texts that have a first chunk, a second, …; all chunks have the same length.
        source: which of the T tokens is where in the blocks, int64; None: those from the first
            text's start on.
        filling: which of them fill up a chunk; None: none does.
        rows: numbers of the others.
    """

    texts: list[int]
    number: Tensor
    lengths: Tensor
    starts: Tensor
    shapes: list[BlockShape]
    source: Tensor | None
    filling: Tensor | None
    rows: Tensor | None


class Texts:
    """How parts of texts are laid out for `mamba2_texts`; for any layer.

    Args:
        lengths: of each, in tokens.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.device = list(lengths), device
        self.starts = [0]
        for length in self.lengths:
            self.starts.append(self.starts[-1] + length)
        self._groups: dict[int, list[_Group]] = {}

    def groups(self, most_tokens: int) -> list[_Group]:
        """In blocks of about so many tokens; less than half of them fill up chunks."""
        if most_tokens not in self._groups:
            order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
            groups: list[list[int]] = []
            for text in order:
                longest = self.lengths[groups[-1][0]] if groups else 0
                chunk = min(longest, CHUNK_TOKENS)
                if (
                    not groups
                    or 2 * self.lengths[text] <= longest
                    or (len(groups[-1]) + 1) * chunk > most_tokens
                ):
                    groups.append([])
                groups[-1].append(text)
            self._groups[most_tokens] = [self._group(texts) for texts in groups]
        return self._groups[most_tokens]

    def _group(self, texts: list[int]) -> _Group:
        lengths, starts = ([of[i] for i in texts] for of in (self.lengths, self.starts))
        chunk = min(lengths[0], CHUNK_TOKENS)
        firsts = range(0, lengths[0], chunk)
        shapes = [BlockShape(sum(n > first for n in lengths), chunk) for first in firsts]
        number, count, start = (
            torch.tensor(each, device=self.device) for each in (texts, lengths, starts)
        )
        count, start = count[:, None], start[:, None]
        in_order = all(start == starts[0] + i * chunk for i, start in enumerate(starts))
        if lengths[-1] == chunk == lengths[0] and in_order:
            return _Group(texts, number, count, start, shapes, None, None, None)
        offsets = torch.arange(chunk, device=self.device)
        source, filling = [], []
        for first, shape in zip(firsts, shapes, strict=True):
            place, held = offsets + first, count[: shape.chunks]
            source.append((start[: shape.chunks] + torch.minimum(place, held - 1)).flatten())
            filling.append((place >= held).flatten())
        fills = torch.cat(filling)
        rows = torch.nonzero(~fills).flatten()
        return _Group(texts, number, count, start, shapes, torch.cat(source), fills, rows)


class _SideBySide(Core):
    """Blocks of a chunk of each of several texts.

    Args:
        before: the inputs of the convolution before each text's first token `[K, k - 1, c]`.
    """

    def convolve(self, block: Block) -> None:
        at, (texts, tokens) = self.buffers(block), block.shape
        kept, channels = self.taps - 1, self.sizes.all_channels
        assert self.before is not None
        raw = WORKSPACE.get(
            "raw_of_texts", at.conv.dtype, at.conv.device, (texts, kept + tokens, channels)
        )
        raw[:, :kept] = self.before[:texts]
        raw[:, kept:] = self.xbc[0, block.tokens].view(texts, tokens, channels)
        self.before = raw[:, tokens:].clone()
        conv = at.conv.view(texts, tokens, channels)
        torch.addcmul(self.conv_bias, raw[:, kept:], self.weight_of_lag[0], out=conv)
        for lag in range(1, self.taps):
            conv.addcmul_(raw[:, kept - lag :][:, :tokens], self.weight_of_lag[lag])
        torch.ops.aten.silu.out(at.conv, out=block.buffers.xbc)


@torch.no_grad()
def mamba2_texts(
    zxbcdt: Tensor,
    parameters: CoreParameters,
    texts: Texts,
    conv_state: Tensor,
    ssm_state: Tensor,
    out: Tensor,
) -> None:
    """Parts of b texts after what their states hold; the states move on in place.

    Args:
        zxbcdt: `[T, w]`.
        conv_state: `[b, k - 1, c]`. ssm_state: `[b, g, n, r*p]`.
        out: `[T, d]` in zxbcdt's dtype: what a forward over all so far has at these tokens.
    """
    most = BLOCK_ELEMENTS_A_THREAD * torch.get_num_threads() // parameters.sizes.channels
    for group in texts.groups(most):
        if len(group.texts) == 1:
            (text,) = group.texts
            part = slice(texts.starts[text], texts.starts[text + 1])
            out[part] = mamba2_chunk(
                zxbcdt[part][None], parameters, conv_state[text : text + 1], [ssm_state[text]]
            )[0]
        else:
            _side_by_side(zxbcdt, parameters, texts, group, conv_state, ssm_state, out)


def _side_by_side(
    zxbcdt: Tensor,
    parameters: CoreParameters,
    texts: Texts,
    group: _Group,
    conv_state: Tensor,
    ssm_state: Tensor,
    out: Tensor,
) -> None:
    sizes, count = parameters.sizes, len(group.texts)
    if group.source is None:
        size = sum(shape.all_tokens for shape in group.shapes)
        first = texts.starts[group.texts[0]]
        place = slice(first, first + size)
        laid, laid_out = zxbcdt[place], out[place]
    else:
        laid = zxbcdt.index_select(0, group.source)
        laid[:, -sizes.heads :].masked_fill_(group.filling[:, None], -torch.inf)  # type: ignore[index]
        laid_out = out.new_empty(len(laid), sizes.channels)
    before = conv_state[group.number]
    inputs = Inputs(
        laid[None], parameters.conv_weight.t(), parameters.conv_bias, parameters.dt_bias,
        parameters.A.squeeze(1), parameters.D.squeeze(1), parameters.norm_weight, None,
    )  # fmt: skip
    core = _SideBySide(inputs, sizes, parameters.norm, before, group.shapes)
    by_head = (count, sizes.groups, sizes.state, sizes.heads_a_group, sizes.head_dim)
    states = ssm_state[group.number].view(by_head).permute(0, 1, 3, 4, 2)  # [K, g, r, p, n]
    carry = states.flatten(1, 2).contiguous()
    for block in core.scan.blocks(0):
        core.forward(
            block, carry[: block.shape.chunks], block.buffers.states, laid_out[block.tokens]
        )
    moved = carry.view(states.shape).permute(0, 1, 4, 2, 3)
    ssm_state[group.number] = moved.reshape(count, *ssm_state.shape[1:])
    if group.source is not None:
        assert group.rows is not None
        out.index_copy_(0, group.source[group.rows], laid_out[group.rows])
    _keep_inputs(zxbcdt, sizes.channels, texts, group, before, conv_state)


def _keep_inputs(
    zxbcdt: Tensor, first: int, texts: Texts, group: _Group, before: Tensor, conv_state: Tensor
) -> None:
    """The last k - 1 inputs of each text, of which some may be from before this part."""
    kept, channels = before.shape[1:]
    places = group.lengths - kept + torch.arange(kept, device=zxbcdt.device)
    last = zxbcdt[group.starts + places.clamp(min=0), first : first + channels].to(before.dtype)
    if any(texts.lengths[i] < kept for i in group.texts):
        index = (places + kept).clamp(max=kept - 1)[..., None].expand(-1, -1, channels)
        last = torch.where(places[..., None] < 0, before.gather(1, index), last)
    conv_state[group.number] = last
