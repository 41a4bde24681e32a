"""From a script with Detectron2's ``DefaultPredictor`` to this project's ``Predictor``.

    python examples/default_predictor.py picture.jpg

The class has another name and reads a LazyConfig; the call and what it returns are the same.
"""

import sys

import cv2

from detection_toolkit.engine import Predictor

if __name__ == "__main__":
    # DefaultPredictor(cfg) with a CfgNode, as before, becomes:
    predictor = Predictor.from_config("stageinteractor/shapes_tiny.py", overrides=sys.argv[2:])
    instances = predictor(cv2.imread(sys.argv[1]))["instances"].to("cpu")
    names = predictor.metadata.thing_classes
    for score, label in zip(instances.scores.tolist(), instances.pred_classes.tolist()):
        if score >= 0.3:
            print(f"{names[label]} {score:.2f}")
