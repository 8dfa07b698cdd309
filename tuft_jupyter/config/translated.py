"""From the applications of a file in Twinkle's form to the values that a file in our own notation gives.

One configuration stays: whatever the notation, the server sees :class:`~tuft_jupyter.config.Settings`. What is accepted
and has no effect here becomes a note, which is logged at the start and printed by ``tuft check-config``; what would
mean something else than its author thinks is a :class:`~tuft_jupyter.config.reader.ConfigError`. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuft_jupyter.config.applications import (
    PROXY_LOCATIONS,
    Application,
    HttpOptions,
    ModelApplication,
    ProcessorApplication,
    SamplerApplication,
    ServerApplication,
    read_applications,
)
from tuft_jupyter.config.reader import SAID, ConfigError, Reader
from tuft_jupyter.config.sections import ModelSettings, Served
from tuft_jupyter.models import without_scheme

KEYS = ("applications", "http_options", "proxy_location")
"""What a file of this form has beside the keys of our own notation."""
MARK = "applications"
TRUST = ("TUFT_TRUST_REMOTE_CODE", "TWINKLE_TRUST_REMOTE_CODE")
"""One switch, by our name and by Twinkle's; ours goes first."""
TRUSTED = TRUST[0].removeprefix("TUFT_").lower()
"""The setting of that name."""
API = "/api/v1"


def translate(reader: Reader, document: Mapping[str, Any], max_lora_rank: int) -> dict[str, Any]:
    """Keyword arguments of Settings for what :data:`KEYS` say, ``backends`` as keys and values of that section.

    ``max_lora_rank`` holds where an application names none.
    """
    if MARK not in document:
        raise reader.error(MARK, "is missing: a file with http_options or proxy_location has it")
    file = _File(reader, read_applications(reader, document[MARK]), max_lora_rank)
    values = file.values()
    location = document.get("proxy_location")
    if location is not None:
        if location not in PROXY_LOCATIONS:
            raise reader.error(
                "proxy_location", f"must be one of {', '.join(PROXY_LOCATIONS)}, not {location!r}"
            )
        file.note("", "proxy_location", "one HTTP server answers, wherever the workers are")
    if "http_options" in document:
        options = reader.build(HttpOptions, document["http_options"] or {}, "http_options")
        values |= {
            name: getattr(options, name) for name in ("host", "port") if getattr(options, name) is not None
        }
    return {**values, "notes": file.notes()}


def check_elsewhere(reader: Reader, said: Mapping[str, Any], backends: Mapping[str, Any]) -> None:
    """ConfigError where the applications (``said``) ask for a Megatron server, and nothing says where it is."""
    external = said.get("training") == backends.get("training") == "external"
    if external and "training_url" not in backends:
        raise reader.error(
            MARK,
            "have a model that a Megatron server is to train (use_megatron: true, backend: megatron), and none is "
            "named: set MEGATRON_SERVER_URL to its address, or use_megatron: false (backend: transformers) to train "
            "here",
        )


@dataclass(frozen=True, slots=True)
class _Placed:
    """An application, and where it stands in the file."""

    place: str
    of: Any


class _File:
    """The applications of one file, by what they are."""

    def __init__(self, reader: Reader, applications: Sequence[Application], max_lora_rank: int) -> None:
        self.reader = reader
        self._notes: dict[str, list[str]] = {}
        self._rank = max_lora_rank
        placed = [_Placed(f"applications[{n}]", each) for n, each in enumerate(applications)]
        seen: dict[str, str] = {}
        for each in placed:
            if each.of.name in seen:
                raise reader.error(f"{each.place}.name", f"is that of {seen[each.of.name]}: {each.of.name!r}")
            seen[each.of.name] = each.place
        self._all = placed
        self._server = self._only(placed, ServerApplication)
        self._processor = self._only(placed, ProcessorApplication)
        config = self._server.of.args.server_config if self._server else None
        self._limit: int = config.per_token_model_limit if config else 0
        self._offered: tuple[str, ...] = config.supported_models if config else ()
        self._models = self._by_model(placed, ModelApplication)
        self._samplers = self._by_model(placed, SamplerApplication)

    def note(self, place: str, key: str, why: str) -> None:
        self._say(f"{key} has no effect here: {why}", place)

    def _say(self, text: str, place: str = "") -> None:
        self._notes.setdefault(text, []).extend([place] if place else [])

    def notes(self) -> tuple[str, ...]:
        """Each once, with the places it is about."""
        return tuple(
            text + (f" ({', '.join(places)})" if places else "") for text, places in self._notes.items()
        )

    def values(self) -> dict[str, Any]:
        names = list(dict.fromkeys([*self._models, *self._samplers]))
        self._check_offered(names)
        for each in self._all:
            self._note_deployment(each)
        values: dict[str, Any] = {
            "supported_models": tuple(self._model(name) for name in names),
            "applications": tuple(self._served()),
            "backends": self._elsewhere(),
        }
        if self._limit:
            values["per_token_model_limit"] = self._limit
        if self._server and (most := self._server.of.deployment.max_ongoing_requests):
            values["max_ongoing_requests"] = most
        if self._processor:
            values["text_workers"] = self._processor.of.args.ncpu_proc_per_node
        shared: dict[str, Callable[[Any], Any]] = {
            "adapter_config.adapter_timeout": lambda args: args.adapter_config.adapter_timeout,
            "adapter_config.adapter_max_lifetime": lambda args: args.adapter_config.adapter_max_lifetime,
            "max_loras": lambda args: args.max_loras,
        }
        for key, get in shared.items():
            said = self._agreed(key, [(each.place, get(each.of.args)) for each in self._models.values()])
            if said is not None:
                values[key.rpartition(".")[2]] = said
        return values

    def _elsewhere(self) -> dict[str, Any]:
        """Keys of the section ``backends``: a Megatron server trains for all models or for none."""
        chosen = self._agreed(
            "backend", [(f"{m.place}.args", m.of.args.backend) for m in self._models.values()]
        )
        if chosen != "megatron":
            return {}
        values: dict[str, Any] = {"training": "external"}
        samplers = list(self._samplers.values())
        kinds = [(f"{each.place}.args", each.of.args.sampler_type) for each in samplers]
        if (kind := self._agreed("sampler_type", kinds)) in ("torch", "vllm"):
            values["sampling"] = kind
        for name in ("enable_lora", "gpu_memory_utilization", "max_loras", "max_lora_rank"):
            given = [(f"{e.place}.args.engine_args", getattr(e.of.args.engine_args, name)) for e in samplers]
            if (value := self._agreed(name, given)) is not None:
                values[name] = value
        return values

    # ---- which application is what

    def _only(self, placed: Iterable[_Placed], kind: type[Application]) -> _Placed | None:
        found = [each for each in placed if isinstance(each.of, kind)]
        if len(found) > 1:
            raise self.reader.error(
                found[1].place, f"is a second {found[1].of.import_path}; a file has one: {found[0].place}"
            )
        return found[0] if found else None

    def _by_model(self, placed: Iterable[_Placed], kind: type[Application]) -> dict[str, _Placed]:
        found: dict[str, _Placed] = {}
        for each in placed:
            if isinstance(each.of, kind):
                name = self._name(each)
                if name in found:
                    raise self.reader.error(
                        each.place,
                        f"serves {name!r}, as {found[name].place} does: one {each.of.import_path} each",
                    )
                found[name] = each
        return found

    def _name(self, placed: _Placed) -> str:
        """What a model is called: as in supported_models, else by its id, else as its directory."""
        plain = without_scheme(placed.of.args.model_id)
        for name in self._offered:
            if name == plain or placed.of.route_prefix.endswith(f"/{name}"):
                return name
        directory = self.reader.base / Path(plain).expanduser()
        if directory.is_dir():
            return directory.resolve().name
        return Path(plain).name if plain.startswith((".", "/", "~")) else plain

    def _check_offered(self, served: Sequence[str]) -> None:
        if not served:
            raise self.reader.error(
                "applications", "must have at least one with import_path: model or sampler"
            )
        if not self._offered or self._server is None:
            return
        place = f"{self._server.place}.args.server_config.supported_models"
        for name in self._offered:
            if name not in served:
                raise self.reader.error(
                    place, f"names {name!r}, which no application serves: they serve {', '.join(served)}"
                )
        for name, each in [*self._models.items(), *self._samplers.items()]:
            if name not in self._offered:
                raise self.reader.error(
                    place, f"does not list {name!r}, which {each.place} serves: add it, or let its route_prefix end "
                    "with a name that is listed",
                )  # fmt: skip

    # ---- what one base model comes to

    def _model(self, name: str) -> ModelSettings:
        trained, sampled = self._models.get(name), self._samplers.get(name)
        both = [each for each in (trained, sampled) if each is not None]
        ids = [(f"{each.place}.args", each.of.args.model_id) for each in both]
        values: dict[str, Any] = {"model_name": name, "model_path": self._agreed("model_id", ids, name)}
        values["max_lora_rank"] = self._rank
        actors = [(f"{each.place}.deployments[0]", each.of.deployment.ray_actor_options) for each in both]
        values["actor_cpus"] = self._agreed(
            "ray_actor_options.num_cpus", [(p, o.num_cpus) for p, o in actors], name
        )
        values["actor_env"] = self._environment([(p, o.runtime_env.env_vars) for p, o in actors], name)
        values[TRUSTED] = self._trusted(values["actor_env"], both[0])
        if trained:
            values |= self._training(trained)
        else:
            self._say(
                f"no application with import_path: model is of {name!r}: it is trained with the defaults"
            )
        if sampled:
            values |= self._sampling(sampled)
        else:
            self._say(
                f"no application with import_path: sampler is of {name!r}: it is sampled with the defaults"
            )
        try:
            return ModelSettings(**values)
        except ConfigError as error:
            raise self.reader.error(both[0].place, f"cannot be used: {error}") from None

    def _training(self, placed: _Placed) -> dict[str, Any]:
        args = placed.of.args
        self._check_gpus(placed)
        return {
            "max_train_len": args.max_length,
            "data_parallel": 1 if args.backend == "megatron" else args.mesh.dp_size,
            "training_gpus": None if args.backend == "megatron" else args.gpus,
            "training_queue": args.queue_config,
        }

    def _sampling(self, placed: _Placed) -> dict[str, Any]:
        args, engine = placed.of.args, placed.of.args.engine_args
        self._check_gpus(placed)
        values = {
            "sampler_type": args.sampler_type,
            "max_model_len": engine.max_model_len,
            "enable_lora": engine.enable_lora,
            "logprobs_mode": engine.logprobs_mode,
            "tensor_parallel_size": args.mesh.tp_size,
            "sampling_replicas": args.mesh.dp_size,
            "sampling_gpus": args.gpus,
            "sampling_queue": args.queue_config,
        }
        for name in ("gpu_memory_utilization", "max_loras", "max_lora_rank"):
            if (given := getattr(engine, name)) is not None:
                values[name] = given
                if args.sampler_type == "torch" and name != "max_lora_rank":
                    self.note(
                        f"{placed.place}.args", f"engine_args.{name}", "the torch sampler has no such limit"
                    )
        return values

    def _check_gpus(self, placed: _Placed) -> None:
        """``ranks`` decides; what else speaks of GPUs must not say otherwise."""
        args, asked = placed.of.args, placed.of.deployment.ray_actor_options.num_gpus
        if asked is not None and args.gpus is not None and asked != args.gpus:
            raise self.reader.error(
                f"{placed.place}.deployments[0].ray_actor_options.num_gpus",
                f"is {asked:g}, and device_group stands for {args.gpus}: leave it out",
            )
        if asked and args.gpus is None:
            raise self.reader.error(
                f"{placed.place}.deployments[0].ray_actor_options.num_gpus",
                "has no effect: say it with args.device_group.ranks",
            )
        if args.gpus and args.nproc_per_node != args.gpus:
            self.note(f"{placed.place}.args", "nproc_per_node", f"device_group.ranks decides, {args.gpus}")

    def _environment(self, given: Sequence[tuple[str, Mapping[str, str]]], model: str) -> dict[str, str]:
        """Of both applications of a model; a variable with two values is an error."""
        names = dict.fromkeys(name for _, variables in given for name in variables)
        return {
            name: self._agreed(
                f"ray_actor_options.runtime_env.env_vars.{name}", [(p, v.get(name)) for p, v in given], model
            )
            for name in names
        }

    def _trusted(self, variables: Mapping[str, str], placed: _Placed) -> bool | None:
        for name in TRUST:
            if name in variables:
                if variables[name].lower() not in SAID:
                    raise self.reader.error(
                        f"{placed.place}.deployments[0].ray_actor_options.runtime_env.env_vars.{name}",
                        f'must be "0" or "1", not {variables[name]!r}',
                    )
                return SAID[variables[name].lower()]
        return None

    def _agreed(self, key: str, given: Sequence[tuple[str, Any]], model: str = "") -> Any:
        """The one value that is given, None if there is none; ConfigError where two differ."""
        said = [(place, value) for place, value in given if value is not None]
        for place, value in said[1:]:
            if value != said[0][1]:
                of = f"of {model!r} " if model else ""
                raise self.reader.error(
                    f"{place}.{key}",
                    f"is {value!r}, and {said[0][0]} {of}says {said[0][1]!r}: it is one value here, give both the same",
                )
        return said[0][1] if said else None

    # ---- what is shown, and what is only accepted

    def _served(self) -> Iterable[Served]:
        of = {each.place: name for name, each in [*self._models.items(), *self._samplers.items()]}
        prefixes: dict[str, str] = {}
        for each in self._all:
            app, model = each.of, of.get(each.place, "")
            default = API if app.import_path == "server" else f"{API}/{app.import_path}/{model}".rstrip("/")
            prefix = app.route_prefix or default
            if prefix in prefixes:
                raise self.reader.error(
                    f"{each.place}.route_prefix",
                    f"is that of {prefixes[prefix]}: {prefix}; give each its own",
                )
            prefixes[prefix] = each.place
            mesh = getattr(app.args, "mesh", None)
            yield Served(
                name=app.name,
                import_path=app.import_path,
                route_prefix=prefix,
                model=model,
                deployment=app.deployment.name,
                device_type="cpu" if mesh is None else mesh.device_type,
                gpus=getattr(app.args, "gpus", 0),
                dp_size=1 if mesh is None else mesh.dp_size,
                tp_size=1 if mesh is None else mesh.tp_size,
            )

    def _note_deployment(self, placed: _Placed) -> None:
        deployment, where = placed.of.deployment, placed.place
        most, target = deployment.max_ongoing_requests, deployment.autoscaling_config.target_ongoing_requests
        if target is not None:
            self.note(where, "autoscaling_config.target_ongoing_requests", "nothing is scaled by it")
            if most and most < target:
                text = (
                    f"max_ongoing_requests ({most}) is below target_ongoing_requests ({target:g}): it holds"
                )
                self._say(text, where)
        options = deployment.ray_actor_options
        if placed.of.import_path in ("server", "processor"):
            given = {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}
            given["runtime_env"] = options.runtime_env.env_vars or None
            for name in [name for name, value in given.items() if value is not None]:
                self.note(where, f"ray_actor_options.{name}", "this application is no Ray actor of its own")
        if most and placed.of.import_path != "server":
            self.note(where, "max_ongoing_requests", "requests wait in their lanes; queue_config limits them")
