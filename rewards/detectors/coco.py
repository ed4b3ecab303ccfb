"""The 80 classes of COCO in its order, as GenEval names them, and what released checkpoints call the same classes."""

from __future__ import annotations

from collections.abc import Sequence

GENEVAL_CLASSES: tuple[str, ...] = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "computer mouse",
    "tv remote",
    "computer keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)

# Other spellings of the same classes in the configurations of released checkpoints, by COCO's order.
_ALIASES = {
    "motorcycle": ("motorbike",),
    "airplane": ("aeroplane",),
    "couch": ("sofa",),
    "potted plant": ("pottedplant",),
    "dining table": ("diningtable",),
    "tv": ("tvmonitor",),
    "computer mouse": ("mouse",),
    "tv remote": ("remote",),
    "computer keyboard": ("keyboard",),
    "hair drier": ("hair dryer",),
    "donut": ("doughnut",),
}


def geneval_names(labels: Sequence[str]) -> tuple[str, ...]:
    """A checkpoint's labels under GenEval's names: where they are COCO's 80 in COCO's order, the three that GenEval
    renames and the other spellings are mapped; any other list is taken as it is."""
    if len(labels) == len(GENEVAL_CLASSES) and all(
        label == name or label in _ALIASES.get(name, ()) for label, name in zip(labels, GENEVAL_CLASSES, strict=True)
    ):
        return GENEVAL_CLASSES
    return tuple(labels)
