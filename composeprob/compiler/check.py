"""Checks capabilities, propriety at the noisiest level, shapes. Nothing is compiled before this has passed."""

from __future__ import annotations

from composeprob.compiler.plausible import check_plausible
from composeprob.compiler.proper import check_tails
from composeprob.compiler.signal import check_signal
from composeprob.compiler.top import check_proper, top_of
from composeprob.errors import CapabilityError, ComposeProbError
from composeprob.ir.nodes import Graph, Leaf, Mixture, Node, Product, fold, leaves


def check(graph: Graph, networks: bool = True) -> Graph:
    """Refuse what cannot be sampled; note what the density offers.

    Args:
        graph: a program whose leaves have slots.
        networks: whether what networks return is looked at too.

    Raises:
        ImproperError: a level that cannot be normalised, or a noisiest one that is not noise alone.
        InvalidValueError: levels that never reach noise.
        CapabilityError: a mixture over a score-only factor.
        NetworkError: a network that cannot be called with its conditions, or is plugged in wrongly.
        ConditionError: a condition that is missing.
    """
    for site in graph.sites:
        check_proper(top_of(site.root, site.shape), site)
        for leaf in leaves(site.root):
            try:
                leaf.first.check_network()
            except ComposeProbError as error:
                raise type(error)(error.found, where=site.where, fix=error.fix) from error
    check_tails(graph)
    check_signal(graph)
    graph = check_plausible(graph) if networks else graph
    for doubt in graph.doubts:
        graph = graph.noted("doubt", doubt)
    return graph.noted("check", f"offers {', '.join(sorted(capabilities(graph)))}")


def capabilities(graph: Graph) -> frozenset[str]:
    """What the program's density offers: what every noised site offers, less what observations take away.

    ``feynman_kac`` is there where every site has a marginal part with a rate, and the rest, which enters the weights
    by its values, can be trusted between modes. Where static sites are held, densities under different values of these
    cannot be compared, and nothing that weighs chains against one another is offered.
    """
    if not graph.sites:
        return frozenset({"score", "energy", "conservative", "mode_depth"})
    offered = []
    for site in graph.sites:
        marginal, rest = site_parts(site.root)
        weighable = marginal is not None and (rest is None or "mode_depth" in node_capabilities(rest))
        offered.append(node_capabilities(site.root) | ({"feynman_kac"} if weighable else set()))
    joined = frozenset.intersection(*offered)
    if graph.held:
        joined -= {"feynman_kac", "mode_depth"}
    return joined - {"normalised", "exact_marginals"} if graph.observations or graph.statics else joined


def node_capabilities(node: Node) -> frozenset[str]:
    """What an expression offers, from what its leaves offer.

    A product keeps ``score``, ``energy``, ``conservative`` and ``mode_depth`` if every part has them, but its
    normaliser is unknown (unless it was calibrated) and its level-k density is not a noised marginal. A mixture of
    normalised parts with shares keeps everything.
    """
    return fold(node, _of_leaf, _of_product, _of_mixture)


def _of_leaf(leaf: Leaf) -> frozenset[str]:
    whole = leaf.region is None or leaf.region.averaged == 1
    return leaf.factor.capabilities if whole else leaf.factor.capabilities - {"normalised"}


def _of_product(node: Product, parts: list[frozenset[str]]) -> frozenset[str]:
    offered = frozenset.intersection(*parts) - {"normalised", "exact_marginals"}
    return offered | {"normalised"} if node.normalised else offered


def _of_mixture(node: Mixture, parts: list[frozenset[str]]) -> frozenset[str]:
    common = frozenset.intersection(*parts)
    if "energy" not in common:
        raise CapabilityError(
            f"A mixture needs the log-density of its parts, but one of {', '.join(leaf.name for leaf in leaves(node))} "
            "offers only its score.",
            fix="use a model trained with an energy parameterization.",
        )
    return common if "normalised" in common else common - {"exact_marginals"}


def has_rate(node: Node) -> bool:
    """Whether the Feynman–Kac rate of an expression follows from its scores.

    Every leaf must be a noised marginal. Inside a mixture they must be normalised too: with unknown constants that
    change from level to level the mixture's shares would drift, and no rate describes that.
    """
    return fold(
        node,
        lambda leaf: "exact_marginals" in leaf.factor.capabilities,
        lambda _, parts: all(parts),
        lambda node, parts: all(parts) and all("normalised" in leaf.factor.capabilities for leaf in leaves(node)),
    )


def site_parts(root: Node) -> tuple[Node | None, Node | None]:
    """Split a site's expression into F, made of noised marginals, and the potential G: everything else.

    A user's energy or a classifier has no rate, but its values are known: it enters the weights between levels as a
    ratio instead. Only factors of the outermost product can be split off.
    """
    terms = [(root, 1.0)] if not isinstance(root, Product) else root.terms
    marginal = [has_rate(child) for child, _ in terms]

    def part(keep: bool) -> Node | None:
        chosen = [term for term, m in zip(terms, marginal, strict=True) if m is keep]
        if not chosen:
            return None
        if len(chosen) == 1 and chosen[0][1] == 1.0:
            return chosen[0][0]
        return Product(tuple(c for c, _ in chosen), tuple(w for _, w in chosen))

    return part(True), part(False)
