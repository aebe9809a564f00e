"""Where an evaluation keeps a trace: in a folder named by all that it depends on."""

import hashlib
from pathlib import Path

from evalsuite.core.spec import canonical_json
from evalsuite.data.models import Checkpoint
from evalsuite.run.trace import TraceRequest


def trace_folder(work: Path, request: TraceRequest, checkpoint: Checkpoint) -> Path:
    """Of one request and one model's weights."""
    whole = {"request": request.model_dump(mode="json"), "weights": checkpoint.fingerprint()}
    digest = hashlib.sha256(canonical_json(whole).encode()).hexdigest()[:8]
    return work / f"{checkpoint.slug}-trace-{digest}"
