"""One rank of `test_sharding.py`: `model_vqa`, with a batch limit after which a rank dies without a word."""

import os
import sys

from llava_mole.eval.model_vqa import main
from llava_mole.inference.predictor import Predictor

if __name__ == "__main__":
    limit = int(os.environ.get("DIE_AFTER", "-1"))
    generate = Predictor.generate

    def limited(self: Predictor, *args, **options) -> list[str]:
        global limit
        if limit == 0:
            os._exit(9)
        limit -= 1
        return generate(self, *args, **options)

    Predictor.generate = limited  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
