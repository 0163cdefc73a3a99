"""The tests' environment. pytest imports this file before the libraries, which read the environment when imported."""

import atexit
import os
import shutil
import tempfile

cache = tempfile.mkdtemp()  # for the indexes of the tests' shards
atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = cache
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a hub
os.environ["OMP_NUM_THREADS"] = "1"  # the models are too small for more threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same bits on every machine
