"""Objects and detections with errors of every kind."""

import random


def make_mixed_case(num_images=30, seed=5):
    """A COCO document of three classes and detections; the same on every machine."""
    random_numbers = random.Random(seed)  # whose random() is the same in all versions of Python
    uniform = random_numbers.random
    images, annotations, results = [], [], []

    def detect(image_id, label, box, score):
        box = [round(float(v), 2) for v in box]
        result = {"image_id": image_id, "category_id": label, "bbox": box}
        results.append({**result, "score": round(score, 4)})

    for image_id in range(1, num_images + 1):
        images.append({"id": image_id, "width": 200, "height": 200, "file_name": f"{image_id}.png"})
        for place in range(4):
            label = 1 + int(3 * uniform())
            side = 20 + 20 * uniform()
            x, y = 100 * (place % 2) + 25 * uniform(), 100 * (place // 2) + 25 * uniform()
            box = [round(v, 2) for v in (x, y, side, side)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
            other = 1 + label % 3
            kind = uniform()
            if kind < 0.6:  # right, and in some cases twice
                detect(image_id, label, (x + 1, y, side, side), 0.4 + 0.6 * uniform())
                if uniform() < 0.3:
                    detect(image_id, label, (x, y + 2, side, side), 0.1 + 0.6 * uniform())
            elif kind < 0.7:
                detect(image_id, other, (x, y + 1, side, side), 0.2 + 0.8 * uniform())
            elif kind < 0.8:
                detect(image_id, label, (x + side / 2, y, side, side), 0.2 + 0.8 * uniform())
            elif kind < 0.9:
                detect(image_id, other, (x + side / 2, y, side, side), 0.2 + 0.8 * uniform())
            if uniform() < 0.2:
                detect(image_id, label, (x, y + 65, 15, 15), 0.1 + 0.7 * uniform())
    categories = [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "bird"), start=1)]
    truth = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    return truth, results
