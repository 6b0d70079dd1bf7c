"""What each method's maps do not say, in a sentence or two: shown beside every map of a report.

What is said here of class, sign and sums follows from the methods' formulas; how strongly each holds on two small
networks is measured in the guide to the methods.
"""

from __future__ import annotations

from collections.abc import Mapping

GENERAL = (
    "A map shows what moved the score of this network, not where disease is. A network that is wrong has maps that look just as convincing.",
    "Zero means: looked, and found nothing. Where nobody looked there is no value at all, and no heat is drawn.",
    "A map is as fine as the network's own cells. Detail finer than a cell is interpolation.",
    "Colours are set for each channel of each image by itself. The same colour in two images or two channels is not the same value: compare the numbers, and only within one method and one model.",
    "Scores are not probabilities, and nothing here is calibrated.",
)
OF_TILES = "Each tile's own score is explained, not a decision about the whole image: the network saw every tile alone."
OF_A_BAG = (
    "The decision is made of all tiles together. A tile's share of it depends on which other tiles there are."
)
ONE_VALUE = "One value a tile, painted over the whole tile: it says nothing of where in the tile."

_SIGNED = "Below zero speaks against the target."
_UNSIGNED = "Never below zero: what speaks against the target cannot be seen, and a weak map may mean either."
_NO_CLASS = "Knows no class: the map is the same whatever is asked for. It shows what the layer responds to, and is no evidence for the target."

_FAMILIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("gradcam", "xgradcam"),
        f"Averages the gradient over a tile: exact behind pooling and one linear layer, wrong at earlier layers. {_SIGNED}",
    ),
    (
        ("hirescam", "cam", "linear_approximation"),
        f"Cells add up to the score, up to its bias, only behind pooling and one linear layer. {_SIGNED}",
    ),
    (
        ("layercam", "gradcampp", "gradcampp_official", "gradcam_elementwise"),
        _UNSIGNED,
    ),
    (
        ("counterfactual",),
        "Shows what speaks against the target: its hottest places are where the class is not.",
    ),
    (
        ("smoothgradcampp",),
        f"A mean over noisy copies of each tile: it depends on how much noise and how many copies. {_SIGNED}",
    ),
    (
        ("igcam",),
        f"Adds up to the difference from a layer that is zero everywhere, which no real image gives. {_SIGNED}",
    ),
    (
        ("shapleycam",),
        f"An approximation of second order around the tile as it is, not exact Shapley values. {_SIGNED}",
    ),
    (
        ("finercam",),
        "Shows what parts the target from the classes most like it, not all that speaks for it. Below zero speaks for those others.",
    ),
    (
        ("guidedbackprop",),
        "Draws the edges of the image more than the class: much of the map stays when the network's weights are shuffled.",
    ),
    (
        ("guidedgradcam",),
        "What class there is in it comes from its Grad-CAM factor; the fine detail is the image's edges. Where Grad-CAM is nowhere positive the map is empty.",
    ),
    (
        ("fullgrad",),
        f"Adds up to the score, and so includes the network's own biases, which are no evidence in the image. {_SIGNED}",
    ),
    (("eigencam", "fem", "kpcacam"), _NO_CLASS),
    (
        ("eigencam_slide",),
        f"{_NO_CLASS} One direction serves all tiles; what lies off it is not shown.",
    ),
    (
        ("eigengradcam",),
        "Its sign is chosen anew in every tile, so that in practice it hardly knows the class, and tiles cannot be compared.",
    ),
    (
        ("eigengradcam_slide",),
        f"One direction serves all tiles; what lies off it is not shown. {_SIGNED}",
    ),
    (
        ("normgrad", "normgrad_layers", "normgrad_proper", "normgrad_meta"),
        "A norm has no sign: evidence for and against look alike. Close to knowing no class.",
    ),
    (("normgrad_selective",), f"Keeps what is positive before taking a norm. {_UNSIGNED}"),
    (
        ("gradient",),
        "How much a cell would matter, not which way. Constant, and flagged, at a layer that is followed by pooling.",
    ),
    (
        ("cfcam_code",),
        "As its authors' code has it, all channels weigh nearly the same: the map is close to their mean and hardly knows the class.",
    ),
    (
        ("cfcam",),
        f"A reconstruction: this project's reading of a paper, not to be reported as published. {_SIGNED}",
    ),
    (
        ("doei",),
        f"A reconstruction: this project's reading of a paper, not to be reported as published. {_UNSIGNED}",
    ),
    (
        ("scorecam", "sscam", "iscam"),
        f"Asks the network about masked tiles, which it never saw in training; a softmax over channels then presses differences together. {_UNSIGNED}",
    ),
    (
        ("ablationcam",),
        f"Takes one channel away at a time: channels that stand in for each other look unimportant. {_SIGNED}",
    ),
    (
        ("rollout",),
        f"{_NO_CLASS} Attention says where the network looked, not what for.",
    ),
    (("attention_relevance", "legrad"), f"Follows attention alone; other paths are left out. {_UNSIGNED}"),
    (
        ("lrp",),
        f"Depends on the propagation rules chosen. Adds up to the score up to what the rules give to biases. {_SIGNED}",
    ),
)
_BAG_FAMILIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("attention",),
        "Unsigned and without a class: how much a tile counted, not for or against what. Shares shrink as the bag grows.",
    ),
    (
        ("instance_probability",),
        "The head's own score of each tile, learned from labels of whole bags: never checked against labels of tiles.",
    ),
    (
        ("contribution",),
        f"Adds up to the logit less its bias, with the attention taken as given: why a tile was attended to is not explained. {_SIGNED}",
    ),
    (
        ("gradient_input",),
        f"The slope at this bag, times the features: right for small changes only. {_SIGNED}",
    ),
    (
        ("integrated_gradients",),
        f"Adds up to the difference from features that are all zero, which no tile has. {_SIGNED}",
    ),
    (
        ("lrp",),
        f"Depends on the propagation rules chosen; attention is taken as given. {_SIGNED}",
    ),
    (
        ("keep_one",),
        "The logit of a bag of this tile alone, a bag the head never saw in training. Tiles that only count together look empty.",
    ),
    (
        ("drop_one",),
        f"Tiles that show the same thing hide each other: taking one away changes nothing. {_SIGNED}",
    ),
)


def _by_name(families: tuple[tuple[tuple[str, ...], str], ...]) -> dict[str, str]:
    return {name: limit for names, limit in families for name in names}


TILE_LIMITS: Mapping[str, str] = _by_name(_FAMILIES)
"""By method, without options."""
BAG_LIMITS: Mapping[str, str] = _by_name(_BAG_FAMILIES)
"""By bag method, without options."""
UNKNOWN = (
    "This version of gigacam knows no limits of this method: nothing is known of how far it can be trusted."
)


def limit(method: str, of_bag: bool) -> str:
    """What a method's maps do not say; options in its name change nothing of it."""
    return (BAG_LIMITS if of_bag else TILE_LIMITS).get(method.partition("+")[0], UNKNOWN)


FLAGS: Mapping[str, str] = {
    "empty": "no cell above zero: no positive evidence in the tile",
    "constant": "the same value in all cells: the map does not say where",
    "not finite": "numbers ran over: the tile has no map",
    "single cell": "the layer has one cell: the map does not say where",
    "doubtful": "defined, but close to arbitrary",
}
"""By `MapFlag.label`."""
