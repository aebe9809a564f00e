"""The two models of an evaluation: under which names they run, and what is known of them before."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from evalsuite.core.errors import MissingDependency, ModelError, UsageError
from evalsuite.data.hub import cache_folder, list_files
from evalsuite.data.models import Checkpoint, find_checkpoint, is_hub_id
from evalsuite.engines.geometry import read_geometry
from evalsuite.experiment.evaluation import ROLES, Evaluation, FromRecords, OfModels, Role
from evalsuite.experiment.quantized import quantized_folder
from evalsuite.quant.checkpoint import open_checkpoint
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import family
from evalsuite.quant.sidecar import small_files
from evalsuite.report.evaluation import PlannedModel
from evalsuite.run.quantize import source_plan
from evalsuite.telemetry.probes import file_system, free_disk_bytes

STORED = "bfloat16"


@dataclass(frozen=True)
class Subject:
    """A model before its steps run.

    Attributes:
        name: as MODEL on the command line.
        checkpoint: with its weights where `planned.origin` is ``here``; else its configuration, in a folder
            of its own; None where there is not even that.
    """

    name: str
    checkpoint: Checkpoint | None
    planned: PlannedModel

    @property
    def short(self) -> str:
        """Of a path, the last part."""
        return self.name.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Models:
    """Of one evaluation, with the folder that it quantizes into."""

    evaluation: Evaluation
    work: Path

    def name(self, role: Role) -> str:
        """As MODEL on the command line.

        Raises:
            EvalError: it is a candidate that has not been made, or whose baseline cannot be found.
        """
        if role == "baseline":
            assert self.evaluation.baseline is not None
            return self.evaluation.baseline
        if self.evaluation.candidate is not None:
            return self.evaluation.candidate
        if not self.folder.is_dir():
            raise UsageError(
                f"The candidate {self.folder} has not been made.",
                todo="run the step that quantizes: leave --only out, or name it too.",
            )
        return str(self.folder)

    @cached_property
    def folder(self) -> Path:
        """That the baseline is quantized into."""
        source = find_checkpoint(self.name("baseline"))
        recipe = self._recipe
        return quantized_folder(
            self.work, source, source.fingerprint(), f"{recipe.method}-{recipe.format}", recipe.as_dict()
        )

    def before(self, scratch: Path) -> dict[Role, Subject]:
        """What is known of each model without downloading or making its weights.

        Args:
            scratch: an empty folder, for the configuration of a checkpoint that is yet to be made.

        Raises:
            UsageError: a model is nothing on this machine, and its name is no hub id.
        """
        found: dict[Role, Subject] = {}
        for role in ROLES:
            if (name := getattr(self.evaluation, role)) is not None:
                found[role] = self._find(role, name)
        if self.evaluation.quantization is not None:
            found["candidate"] = self._to_make(found["baseline"], scratch)
        coming: dict[int, int] = {}
        for role, subject in found.items():
            planned = subject.planned
            if planned.origin != "here":
                disk = file_system(self.folder if planned.origin == "made" else Path(cache_folder()))
                there = replace(planned, before_bytes=coming.get(disk, 0))
                found[role] = replace(subject, planned=there)
                coming[disk] = there.before_bytes + (planned.weights_bytes or 0)
        return found

    @property
    def _recipe(self) -> Recipe:
        assert self.evaluation.quantization is not None
        return self.evaluation.quantization.recipe

    def _needs_weights(self, role: Role) -> bool:
        """Whether a step reads more than the configuration."""
        evaluation = self.evaluation
        if evaluation.quantization is not None and role == "baseline":
            return True
        for step in evaluation.steps:
            if isinstance(step, FromRecords):
                continue
            touched = evaluation.roles(step) if isinstance(step, OfModels) else ROLES[:1]
            if role in touched and getattr(step, "load_format", "auto") != "dummy":
                return True
        return False

    def _find(self, role: Role, name: str) -> Subject:
        weights = self._needs_weights(role)
        try:
            checkpoint = find_checkpoint(name, weights=weights, download=False)
        except MissingDependency:
            raise
        except ModelError:
            if not is_hub_id(name):
                raise
            return self._on_hub(role, name)
        size = sum(path.stat().st_size for path in checkpoint.weight_files())
        free = free_disk_bytes(checkpoint.folder)
        return Subject(name, checkpoint, PlannedModel(role, name, "here", size, free))

    def _on_hub(self, role: Role, name: str) -> Subject:
        free = free_disk_bytes(Path(cache_folder()))
        try:
            size = list_files(name).missing_bytes
            checkpoint = replace(find_checkpoint(name, weights=False), weights=True)
            return Subject(name, checkpoint, PlannedModel(role, name, "hub", size, free))
        except ModelError:
            folder = getattr(self.evaluation.geometry, role)
        if folder is None:
            return Subject(name, None, PlannedModel(role, name, "unknown", None, free))
        checkpoint = replace(find_checkpoint(folder, weights=False), name=name, weights=True)
        size = read_geometry(checkpoint, STORED).total_bytes
        return Subject(name, checkpoint, PlannedModel(role, name, "geometry", size, free))

    def _to_make(self, source: Subject, scratch: Path) -> Subject:
        free = free_disk_bytes(self.work)
        if source.checkpoint is None or source.planned.origin != "here":
            name = f"{source.name}, quantized"
            return Subject(name, None, PlannedModel("candidate", name, "unknown", None, free))
        folder = self.folder
        if folder.is_dir():
            checkpoint = find_checkpoint(str(folder))
            size = sum(path.stat().st_size for path in checkpoint.weight_files())
            return Subject(
                str(folder), checkpoint, PlannedModel("candidate", str(folder), "here", size, free)
            )
        plan = source_plan(source.checkpoint, self._recipe, codes=False)
        planned = PlannedModel("candidate", str(folder), "made", plan.bytes_after, free)
        if source.checkpoint.gguf is not None:
            return Subject(str(folder), None, planned)
        config = open_checkpoint(source.checkpoint.folder).config
        files = small_files(source.checkpoint.folder, config, family(config), plan, self._recipe)
        for name, data in files.items():
            (scratch / name).write_bytes(data)
        return Subject(str(folder), Checkpoint(folder.name, scratch), planned)
