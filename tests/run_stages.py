"""Run several stages in one process, as one launch of torchrun costs seconds: python run_stages.py JSON.

JSON: a list of [script name, argument, ...].
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

for script, *argv in json.loads(sys.argv[1]):
    importlib.import_module(script).main(argv)
