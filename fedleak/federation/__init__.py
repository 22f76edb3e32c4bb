"""The Flower side: honest clients, the server's strategies, the eavesdropper around them, and two engines."""

import logging
import os

# Before Flower's first import: a privacy tool does not phone home, and under Hydra every log line would print twice.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
logging.getLogger("flwr").propagate = False
