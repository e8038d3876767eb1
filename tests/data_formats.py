"""Small true-to-form data files of every format, as Python objects.

What the tests of readers, filters and attacks start from."""

import json
from pathlib import Path

BOX, TRACK = (
    [0.1, 0.2, 0.5, 0.8],
    [
        {"frame": 192, "bbox": [0.1, 0.2, 0.3, 0.6], "enabled": True},
        {"frame": 333, "bbox": [0.2, 0.2, 0.4, 0.6], "enabled": False},
    ],
)
PHOTOS = ("a.jpg", "b.jpg", "sub/c.jpg")
VIDEOS = ("Abuse001_x264.mp4", "Normal_Videos_003_x264.mp4")

COLOURS = ("green", "blue", "white", "black", "grey", "pink", "brown", "gold", "tan", "lime")
FINEHARD = [
    {
        "f_path": p,
        "caption": f"A long caption of photo {i}.",
        "short_caption": f"photo {i}",
        "bbox_info": [
            {
                "bbox": BOX,
                "short_expr": "a red mug",
                "long_expr": "a red mug that stands on a table",
                "flag_short_neg": 1,
                "short_expr_negs": {str(k): f"a {c} mug" for k, c in enumerate(COLOURS)},
            },
            {
                "bbox": [0.5, 0.5, 0.9, 0.9, 0.87],
                "short_expr": "a table",
                "long_expr": "a table of wood",
                "flag_short_neg": 0,
            },
        ],
    }
    for i, p in enumerate(PHOTOS)
]
VIDEO_DICT = {
    VIDEOS[0]: {
        "global": {"Caption": "A man is beaten."},
        "region": [{"caption": "a man hits", "keyframes": TRACK}],
    },
    VIDEOS[1]: {"global": {"Caption": "People walk."}, "region": [{"caption": "people walking"}]},
}
VIDEO_LIST = [
    {
        "f_path": f"Abuse/{VIDEOS[0]}",
        "global_caption": "A man is beaten.",
        "bbox_info": [
            {"caption": "a man hits", "start_frame": 192, "end_frame": 333, "keyframes": TRACK}
        ],
    },
    {"f_path": VIDEOS[1], "global_caption": "People walk.", "bbox_info": []},
]
VIDEO_TIMES = [
    {
        "video": VIDEOS[0],
        "global_caption": "A man is beaten.",
        "region_captions": ["a man hits", "a man falls"],
        "box_infos": [TRACK, TRACK[:1]],
        "timestamps": [1.5, 9.25],
    },
    {
        "video": VIDEOS[1],
        "global_caption": "People walk.",
        "region_captions": [],
        "box_infos": [],
        "timestamps": None,
    },
]
LABEL_STUDIO = [
    {
        "id": 7,
        "data": {"video": "/data/upload/3/1f0c9a2b-Abuse001_x264.mp4"},
        "annotations": [
            {
                "id": 1,
                "result": [
                    {
                        "id": "r1",
                        "type": "videorectangle",
                        "value": {
                            "labels": ["person"],
                            "framesCount": 400,
                            "sequence": [
                                {
                                    "frame": 10,
                                    "x": 10,
                                    "y": 20,
                                    "width": 20,
                                    "height": 40,
                                    "enabled": True,
                                    "rotation": 0,
                                },
                                {
                                    "frame": 30,
                                    "x": 20,
                                    "y": 20,
                                    "width": 20,
                                    "height": 40,
                                    "enabled": False,
                                    "rotation": 0,
                                },
                            ],
                        },
                    },
                    {"id": "r1", "type": "textarea", "value": {"text": ["a man hits"]}},
                    {"id": "c1", "type": "textarea", "value": {"text": ["A man is beaten."]}},
                ],
            }
        ],
    }
]
FGOVD = [
    {
        "img_path": PHOTOS[i // 2],
        "bbox": [10.0, 20.0, 30.0, 40.0],
        "pos_expression": ["A red mug."],
        "neg_expression": ["A green mug.", "A blue mug."],
        "category_id": 0,
        "width": 100,
        "height": 200,
        "sent_id": i,
    }
    for i in range(4)
]
COCO = {
    "images": [
        {"id": i, "file_name": p, "width": 100, "height": 200} for i, p in enumerate(PHOTOS)
    ],
    "annotations": [
        {
            "id": i,
            "image_id": i % 3,
            "category_id": 1 + i % 2,
            "bbox": [10, 20, 30, 40],
            "iscrowd": 0,
        }
        for i in range(5)
    ],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "apple"}],
}
COCO_CAPTIONS = {
    "images": COCO["images"],
    "annotations": [{"id": i, "image_id": i % 2, "caption": f"Caption {i}"} for i in range(5)],
}
SUGARCREPE = {
    str(i): {
        "filename": p,
        "caption": f"A mug on table {i}.",
        "negative_caption": f"A table on mug {i}.",
    }
    for i, p in enumerate(PHOTOS)
}
UCA = {
    "Abuse001_x264": {
        "duration": 91.0,
        "timestamps": [[0.0, 5.3], [7.0, 8.5]],
        "sentences": ["A man enters.", "He leaves."],
    },
    "Normal_Videos_003_x264": {
        "duration": 20.0,
        "timestamps": [[1.0, 3.0]],
        "sentences": ["Cars pass."],
    },
}
REGIONS = [
    {
        "image": PHOTOS[0],
        "width": 100,
        "height": 200,
        "split": "train",
        "captions": ["A mug.", "a red mug on a table"],
        "caption_negatives": [{"caption": "A mug.", "negative": "A bowl.", "type": "replace_obj"}],
        "regions": [
            {
                "bbox": [10, 20, 50, 180],
                "caption": "a red mug",
                "negatives": ["a green mug"],
                "negatives_level": "hard",
                "negatives_by_level": {"hard": ["a green mug"], "trivial": ["a dog"]},
            }
        ],
        "objects": [{"bbox": [0, 0, 100, 100], "category": "apple"}],
    },
    {
        "image": PHOTOS[1],
        "caption": "Long.",
        "short_caption": "short",
        "regions": [{"bbox": BOX, "caption": "fractions"}],
    },
    {
        "video": VIDEOS[0],
        "caption": "A man is beaten.",
        "span": [1.0, 9.0],
        "label": "Abuse",
        "regions": [{"keyframes": TRACK, "caption": "a man hits"}],
    },
]

DOCUMENTS = dict(
    finehard=FINEHARD,
    video_dict=VIDEO_DICT,
    video_list=VIDEO_LIST,
    video_times=VIDEO_TIMES,
    label_studio=LABEL_STUDIO,
    fgovd=FGOVD,
    coco=COCO,
    coco_captions=COCO_CAPTIONS,
    uca=UCA,
    regions=REGIONS,
    sugarcrepe=SUGARCREPE,
)


def write(path, document, lines=False):
    "The document as JSON, or as JSON lines."
    text = "\n".join(json.dumps(d) for d in document) if lines else json.dumps(document)
    Path(path).write_text(text, encoding="utf-8")
    return path


def put_box(document, entry, box):
    "A FineHARD document with one box replaced."
    document = json.loads(json.dumps(document))
    document[entry]["bbox_info"][1]["bbox"] = box
    return document


def media_root(folder):
    "A folder with a (tiny) photo or an empty video for every name above."
    from PIL import Image

    for name in PHOTOS + VIDEOS:
        p = Path(folder) / name
        p.parent.mkdir(parents=True, exist_ok=True)
        if name in PHOTOS:
            Image.new("RGB", (100, 200), "green").save(p)
        else:
            p.touch()
    return Path(folder)
