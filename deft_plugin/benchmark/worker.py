"""The other half of `processes`: one contestant's process, which prints a line of JSON for each job."""

from __future__ import annotations

import json
import sys

from .job import Job
from .measure import work

if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    work(request["name"], [Job(**job) for job in request["jobs"]])
