"""`expertd bench decode`: tokens a second under a budget, beside all experts resident, a variant, and a peer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from expertd_engine.bench.contender import Contender
from expertd_engine.bench.options import DecodeOptions, peer_specification
from expertd_engine.bench.protocol import Decoded, DecodeRequest, DescribeRequest, DiskRead, DiskRequest, EngineFacts
from expertd_engine.bench.race import Runner, enter, paired, race
from expertd_engine.bench.report import finish, mebibytes, number, percent, spread
from expertd_engine.bench.stats import Interval, bound_tok_s, median_interval, ratio_interval, serial_tok_s

_DISK_SECONDS = 0.7
