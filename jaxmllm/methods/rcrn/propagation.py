"""Belief propagation of RCRN on padded batches of language graphs (GITM-MR, arXiv 2308.01236; gitm_mr.md 2.6, 2.7).

A graph has entity nodes and relation edges (subject -> object); the referred object is its root. Every node holds a
belief in (0, 1] over the candidate boxes of its image; every edge holds relation scores A[box of the subject, context
box of the object]. The bottom-up run carries evidence from the objects to the root, the top-down run back.

Axis letters of this file and of `rcrn.py`: B graphs, M nodes, E edges, N boxes, K context boxes of an edge.

    one chain of two edges, padded to M = 4, E = 3:      edges [[0, 1], [1, 2], [0, 0]]   edge_mask [1, 1, 0]
                                                         node_mask [1, 1, 1, 0]           levels [0, 1, 2, -1]

Both runs work level by level in log space, so a batch of different trees is one program. A node's level is its longest
path from the root: on trees this is the depth, and on graphs with several parents it is a topological order, where
the released program fires nodes too early and reads only the first parent (gitm_mr.md 5, gaps 3 and 4). Levels are
laid down by the host, which has to check the graph anyway.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

EPS = 1e-6  # floor of a belief and of a message
_TINY = 1e-30  # keeps the logarithm finite if a caller passes a belief of exactly 0


@struct.dataclass
class Graphs:
    """A padded batch of rooted language graphs; build it with `pad_graphs`."""

    edges: Int[Array, "B E 2"]  # (subject node, object node); (0, 0) on padding
    edge_mask: Bool[Array, "B E"]
    node_mask: Bool[Array, "B M"]
    root: Int[Array, "B"]
    levels: Int[Array, "B M"]  # longest path from the root; -1 for padding and nodes that the root does not reach
    rank: Int[Array, "B E"]  # place of the edge in breadth-first order from the root; breaks ties of the readout


def pad_graphs(
    graphs: Sequence[tuple[int, Sequence[Sequence[int]], int]],
    max_nodes: int | None = None,
    max_edges: int | None = None,
) -> Graphs:
    """`Graphs` from (number of nodes, [(subject, object), ...], root) triples, on the host.

    Raises:
        ValueError: an edge or root names a node that does not exist, a graph has a cycle, or it exceeds the padding.
    """
    most_nodes, most_edges = max((n for n, _, _ in graphs), default=1), max((len(e) for _, e, _ in graphs), default=0)
    m = most_nodes if max_nodes is None else max_nodes
    e = max(1, most_edges) if max_edges is None else max_edges
    if most_nodes > m or most_edges > e:
        raise ValueError(f"a graph of {most_nodes} nodes, {most_edges} edges does not fit {m} nodes, {e} edges")
    edges, edge_mask = np.zeros((len(graphs), e, 2), np.int32), np.zeros((len(graphs), e), bool)
    node_mask, levels = np.zeros((len(graphs), m), bool), np.full((len(graphs), m), -1, np.int32)
    roots, rank = np.zeros(len(graphs), np.int32), np.full((len(graphs), e), e, np.int32)
    for b, (n, pairs, root) in enumerate(graphs):
        if not 0 <= root < n or any(not 0 <= v < n for pair in pairs for v in pair):
            raise ValueError(f"graph {b}: an edge or the root names a node outside 0..{n - 1}")
        levels[b, :n] = _levels(n, pairs, root)
        if levels[b].max() >= n:
            raise ValueError(f"graph {b} has a cycle: {list(map(tuple, pairs))}")
        roots[b], node_mask[b, :n] = root, True
        for i, (subject, object_) in enumerate(pairs):
            edges[b, i], edge_mask[b, i] = (subject, object_), True
        for place, i in enumerate(_breadth_first(pairs, root)):
            rank[b, i] = place
    return Graphs(*map(jnp.asarray, (edges, edge_mask, node_mask, roots, levels, rank)))


def referent(n: int, pairs: Sequence[Sequence[int]]) -> int:
    """Root of a parsed graph: of the nodes without a parent the one with most descendants, the last among equals.

    Raises:
        ValueError: every node has a parent.
    """
    roots = set(range(n)) - {child for _, child in pairs}
    if not roots:
        raise ValueError("the graph has no root: every node has a parent")
    return max(roots, key=lambda root: (sum(level > 0 for level in _levels(n, pairs, root)), root))


def _levels(n: int, pairs: Sequence[Sequence[int]], root: int) -> list[int]:
    """Longest path from the root to each node, -1 where there is none; a level of n or more betrays a cycle."""
    levels = [-1] * n
    levels[root] = 0
    for _ in range(n):
        for parent, child in pairs:
            if levels[parent] >= 0:
                levels[child] = max(levels[child], levels[parent] + 1)
    return levels


def _breadth_first(pairs: Sequence[Sequence[int]], root: int) -> list[int]:
    """Edge indices in breadth-first order from the root."""
    seen, order = [root], []
    for v in seen:  # grows while it is read
        for i, (parent, child) in enumerate(pairs):
            if parent == v:
                order.append(i)
                if child not in seen:
                    seen.append(child)
    return order


def active_edges(graphs: Graphs) -> Bool[Array, "B E"]:
    """Edges that can be reached from the root."""
    return graphs.edge_mask & (jnp.take_along_axis(graphs.levels, graphs.edges[..., 0], 1) >= 0)


def _of_nodes(values: Float[Array, "B M N"], nodes: Int[Array, "B E"]) -> Float[Array, "B E N"]:
    return jnp.take_along_axis(values, nodes[..., None], 1)


def _top_k(b: Float[Array, "... N"], k: int, real: Bool[Array, "... N"] | None) -> Int[Array, "... K"]:
    # Indices carry no gradient; padding is put last so that it is chosen only if there are fewer than k real boxes.
    b = jax.lax.stop_gradient(b)
    return jax.lax.top_k(b if real is None else jnp.where(real, b, -jnp.inf), min(k, b.shape[-1]))[1]


def contexts(
    b_loc: Float[Array, "B M N"], graphs: Graphs, k: int, real: Bool[Array, "B N"] | None = None
) -> Int[Array, "B E K"]:
    """The k boxes of largest belief of each edge's object node, descending; `real` excludes padding boxes."""
    return _top_k(_of_nodes(b_loc, graphs.edges[..., 1]), k, None if real is None else real[:, None])


def candidate_masks(
    b_loc: Float[Array, "B M N"], graphs: Graphs, k: int, mode: str, real: Bool[Array, "B N"] | None = None
) -> tuple[Bool[Array, "B N"], Bool[Array, "B E N"]]:
    """(valid boxes, subject boxes of each edge) of a run (table of gitm_mr.md 2.6).

    `grd`: every real box for both. `match`: valid is the union of the nodes' top-k boxes, rows are the subject's top-k.

    Raises:
        ValueError: unknown mode.
    """
    real = jnp.ones(b_loc[:, 0].shape, bool) if real is None else real
    if mode == "grd":
        return real, jnp.broadcast_to(real[:, None], (*graphs.edge_mask.shape, real.shape[-1]))
    if mode != "match":
        raise ValueError(f"mode must be 'grd' or 'match', got {mode!r}")
    top = jax.nn.one_hot(_top_k(b_loc, k, real[:, None]), b_loc.shape[-1]).sum(-2) > 0  # [B, M, N]
    top &= real[:, None]
    return (top & (graphs.levels >= 0)[..., None]).any(1), jnp.take_along_axis(top, graphs.edges[..., 0, None], 1)


def _gated(
    log_b: Float[Array, "B M N"],
    log_message: Float[Array, "B M N"],
    gate: Float[Array, "B M"],
    valid: Bool[Array, "B N"],
) -> Float[Array, "B M N"]:
    """log Norm(b * message ** gate), EPS on boxes that are not valid. The divisor max(1, max b) carries no gradient.

    As released, the divisor is taken before boxes that are not valid are set to EPS. Of those only a context box of a
    top-down run can exceed 1, by a message above 1; to look at the others would let in what stands at padding.
    """
    log_b = log_b + gate[..., None] * log_message
    counted = valid[:, None] | (log_message > 0)
    largest = jnp.where(counted, log_b, -jnp.inf).max(-1, keepdims=True)
    return jnp.where(valid[:, None], log_b - jax.lax.stop_gradient(jnp.maximum(largest, 0)), jnp.log(EPS))


def up_messages(
    b_object: Float[Array, "B E N"], A: Float[Array, "B E N K"], ctx: Int[Array, "B E K"], valid: Bool[Array, "B N"]
) -> Float[Array, "B E N"]:
    """T_e[i] = EPS + sum_k A_e[i, k] b_object[ctx_k] valid[ctx_k]: what the object says about a subject box.

    `A` is 0 outside the rows of the edge.
    """
    inside = jnp.take_along_axis(jnp.broadcast_to(valid[:, None], b_object.shape), ctx, -1)
    chosen = jnp.where(inside, jnp.take_along_axis(b_object, ctx, -1), 0)
    return EPS + jnp.einsum("benk,bek->ben", jnp.where(inside[:, :, None], A, 0), chosen)


def down_messages(
    b_subject: Float[Array, "B E N"], A: Float[Array, "B E N K"], ctx: Int[Array, "B E K"], valid: Bool[Array, "B N"]
) -> Float[Array, "B E N"]:
    """T_e[ctx_k] = EPS + sum_i A_e[i, k] b_subject[i] valid[i], and EPS on boxes outside the context.

    `A` is 0 outside the rows of the edge and at context boxes that are padding.
    """
    chosen = jnp.einsum("ben,benk->bek", jnp.where(valid[:, None], b_subject, 0), A)
    return EPS + jnp.einsum("bek,bekn->ben", chosen, jax.nn.one_hot(ctx, b_subject.shape[-1], dtype=chosen.dtype))


def bottom_up(
    b_loc: Float[Array, "B M N"],
    A: Float[Array, "B E N K"],
    ctx: Int[Array, "B E K"],
    graphs: Graphs,
    gate: Float[Array, "B M"],
    valid: Bool[Array, "B N"],
    rows: Bool[Array, "B E N"],
    wildcard: Bool[Array, "B E"] | None = None,
    clip: bool = False,
) -> Float[Array, "B M N"]:
    """Beliefs after the run objects -> subjects: b_p <- Norm(b_p prod_e T_e ** gate_p), children first.

    Leaves, unreachable nodes and padding keep `b_loc`. A `wildcard` edge sends T = 1. `clip` bounds T by 1, which makes
    0/1 scores an exact constraint check (a subject related to two objects must not count double).
    """
    return _run(b_loc, up_messages, A, ctx, graphs, gate, valid, rows, (1, 0), wildcard, clip)


def top_down(
    b_loc: Float[Array, "B M N"],
    A: Float[Array, "B E N K"],
    ctx: Int[Array, "B E K"],
    graphs: Graphs,
    gate: Float[Array, "B M"],
    valid: Bool[Array, "B N"],
    rows: Bool[Array, "B E N"],
    clip: bool = False,
) -> Float[Array, "B M N"]:
    """Beliefs after the run subjects -> objects: b_c <- Norm(b_loc_c T_e ** gate_c); the root keeps `b_loc`.

    A node with several parents multiplies their messages. A context box that is not valid ends at EPS, but its message
    enters the divisor, so `A` must be 0 at padding. See `bottom_up` for `clip`.
    """
    return _run(b_loc, down_messages, A, ctx, graphs, gate, valid, rows, (0, 1), None, clip)


def _run(b_loc, message, A, ctx, graphs, gate, valid, rows, ends, wildcard, clip):
    """The shared loop: messages flow from edge end `ends[0]` to end `ends[1]`, one level of receiving nodes a step."""
    sender, receiver = graphs.edges[..., ends[0]], graphs.edges[..., ends[1]]
    active = active_edges(graphs)
    A = jnp.where(active[..., None, None] & rows[..., None], A, 0)  # also keeps NaN at padding out of the products
    arrives = (receiver[..., None] == jnp.arange(b_loc.shape[1])) & active[..., None]  # [B, E, M]
    receives = arrives.any(1)
    gate = jnp.where(receives, gate, 0)
    silent = ~active if wildcard is None else ~active | wildcard

    def level(log_b, at):
        T = message(_of_nodes(jnp.exp(log_b), sender), A, ctx, valid)
        log_T = jnp.where(silent[..., None], 0, jnp.log(jnp.minimum(T, 1) if clip else T))
        incoming = jnp.einsum("bem,ben->bmn", arrives.astype(log_T.dtype), log_T)
        here = receives & (graphs.levels == at)
        return jnp.where(here[..., None], _gated(log_b, incoming, gate, valid), log_b), None

    last = b_loc.shape[1] - 1
    order = jnp.arange(1, last + 1) if ends == (0, 1) else jnp.arange(last - 1, -1, -1)
    log_b = jax.lax.scan(level, jnp.log(jnp.maximum(b_loc, _TINY)), order)[0]
    return jnp.where(receives[..., None], jnp.exp(log_b), b_loc)


def matching_score(score: Float[Array, "B M"], graphs: Graphs) -> Float[Array, "B"]:
    """The smallest node score over the nodes that the root reaches."""
    return jnp.where(graphs.levels >= 0, score, jnp.inf).min(-1)


def readout(
    score_bp: Float[Array, "B M"], score_td: Float[Array, "B M"], graphs: Graphs, mrr_on: str = "logit"
) -> tuple[Float[Array, "B"], Float[Array, "B E"], Int[Array, "B"]]:
    """The released readout: (matching logit, d of each edge, edge of smallest d).

    d_e = (bp_subject - bp_object) + (td_object - td_subject): under a wrong edge the bottom-up score is fine and above
    it collapses, top-down the reverse. It is inexact on branching graphs even with perfect scores, because the top-down
    run ignores sibling branches; `counterfactual_readout` is exact. d is 0 on padding; a graph without edges gives edge
    0. `mrr_on` "prob" takes the differences after a sigmoid, as the paper's figure shows them; the program uses logits.

    Raises:
        ValueError: unknown `mrr_on`.
    """
    if mrr_on not in ("logit", "prob"):
        raise ValueError(f"mrr_on must be 'logit' or 'prob', got {mrr_on!r}")
    itm = jnp.minimum(matching_score(score_bp, graphs), matching_score(score_td, graphs))
    bp, td = (score_bp, score_td) if mrr_on == "logit" else (jax.nn.sigmoid(score_bp), jax.nn.sigmoid(score_td))
    subject, object_ = graphs.edges[..., 0], graphs.edges[..., 1]
    take = jnp.take_along_axis
    d = take(bp, subject, 1) - take(bp, object_, 1) + take(td, object_, 1) - take(td, subject, 1)
    active = active_edges(graphs)
    return itm, jnp.where(active, d, 0), _first(jnp.where(active, d, jnp.inf), graphs)


def _first(cost: Float[Array, "B E"], graphs: Graphs) -> Int[Array, "B"]:
    """Edge of least cost, the first in breadth-first order among equals; 0 without edges."""
    tied = cost == cost.min(-1, keepdims=True)
    return jnp.argmin(jnp.where(tied & active_edges(graphs), graphs.rank, graphs.rank.shape[-1]), -1)


def counterfactual_readout(
    b_loc: Float[Array, "B M N"],
    A: Float[Array, "B E N K"],
    ctx: Int[Array, "B E K"],
    graphs: Graphs,
    gate: Float[Array, "B M"],
    valid: Bool[Array, "B N"],
    rows: Bool[Array, "B E N"],
    node_score: Callable[[Float[Array, "B M N"]], Float[Array, "B M"]],
    clip: bool = False,
) -> tuple[Float[Array, "B E"], Int[Array, "B"]]:
    """The corrected readout: (matching score with each edge removed, edge whose removal raises it most).

    Each edge in turn becomes a wildcard and the bottom-up run is repeated; the score is the smallest node score. The
    root score alone would not do: removing an edge above the wrong one drops the whole branch and repairs the root as
    well, while the branch's own nodes still show the fault. With exact scores and one edge to blame it is exact.
    Scores are -inf on padding; a graph without edges gives edge 0.
    """

    def without(edge):
        wildcard = jnp.zeros(graphs.edge_mask.shape, bool).at[:, edge].set(True)
        return matching_score(node_score(bottom_up(b_loc, A, ctx, graphs, gate, valid, rows, wildcard, clip)), graphs)

    scores = jax.vmap(without, out_axes=1)(jnp.arange(graphs.edge_mask.shape[1]))
    active = active_edges(graphs)
    return jnp.where(active, scores, -jnp.inf), _first(jnp.where(active, -scores, jnp.inf), graphs)
