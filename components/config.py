"""Every setting of Tune16: one frozen model per step, with description, limits and unit per field.

The defaults are the reference recipe: Llama-2-7b-chat on guanaco-llama2-1k as the QLoRA notebooks train it. A recipe
file sets any field under its step's name; the pipeline's form (:data:`FORM`) has fields for the most
used ones and takes the rest of a step as one JSON object.
"""

import difflib
import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from components.runtime.errors import Tune16Error

# The keys of an OpenShift AI connection, and the variables that the steps read.
GPU = "nvidia.com/gpu"  # the resource that a pod requests, and the taint key of GPU nodes
CONNECTION_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_S3_ENDPOINT",
    "AWS_DEFAULT_REGION",
    "AWS_S3_BUCKET",
)
SESSION_TOKEN = "AWS_SESSION_TOKEN"  # beside the keys of a connection that expire
TOKEN_VARIABLES = ("HF_TOKEN", "WANDB_API_KEY")

# The verdicts of the step evaluate: a new champion, the current one stays, or the rows do not show which is better.
PROMOTED = "promoted"
KEPT = "kept"
INCONCLUSIVE = "inconclusive"

Config = TypeVar("Config", bound="StepConfig")
Share = Annotated[float, Field(ge=0, lt=1, json_schema_extra={"unit": "share of 1"})]


class StepConfig(BaseModel):
    """Base of the step models: frozen, strict about unknown keys, and clear about what is wrong."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def load(cls, options: dict[str, Any] | str | None = None, **fields: Any) -> Self:
        """Build the settings of one step from its form `fields` and its JSON `options`, also as text.

        Raises:
            Tune16Error: a key is unknown or given twice, or a value is out of its limits; every error is reported.
        """
        step = step_name(cls)
        place = _FIELDS.get(f"{step}.{_OPTIONS}", step)
        if isinstance(options, str):
            options = _as_object(options, place)
        twice = sorted(set(options or {}) & set(fields))
        if twice:
            own = form_field(f"{step}.{twice[0]}")
            raise Tune16Error(f"{place}: '{twice[0]}' has a field of its own, {own}. Set it there.")
        return parse(cls, {**(options or {}), **fields}, where=step, form_of=step)


def _as_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object that arrived as text, as some clients of the pipeline server send it."""
    try:
        content = json.loads(text or "{}")
    except ValueError as error:
        raise Tune16Error(f"{where}: is not valid JSON ({error}). Write an object, such as {{}}.") from None
    if not isinstance(content, dict):
        raise Tune16Error(f"{where}: is a JSON {type(content).__name__}, but an object is needed, such as {{}}.")
    return content


class PreflightConfig(StepConfig):
    """The inputs, and the GPU memory that training must fit into."""

    model: str = Field(
        "NousResearch/Llama-2-7b-chat-hf",
        min_length=1,
        description="Model to tune: a Hugging Face id, optionally with @revision, an s3:// or https:// folder, or a "
        "path. s3:///folder means the connection's own bucket.",
    )
    data: str = Field(
        "mlabonne/guanaco-llama2-1k",
        min_length=1,
        description="Data set: a Hugging Face id, an s3:// or https:// address, or a path, of JSONL, JSON, CSV or "
        "Parquet files.",
    )
    gpu_memory: float = Field(
        14.2,
        gt=0,
        le=1024,
        description="GPU memory available to tensors: 14.2 GiB on a 16 GB card.",
        json_schema_extra={"unit": "GiB"},
    )


class PrepareConfig(StepConfig):
    """How rows become token sequences."""

    max_tokens: int = Field(
        1024,
        ge=16,
        le=131072,
        description="Longest sequence, and the length of a packed one; longer conversations are cut at the end.",
        json_schema_extra={"unit": "tokens"},
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "llama2_text", "oasst"] = Field(
        "auto", description="Format of the rows; auto detects it from the keys of the first row."
    )
    template: Literal["auto", "llama2", "llama3", "mistral", "qwen2", "qwen3", "phi3", "chatml"] = Field(
        "auto", description="Chat template; auto uses the one that comes with the model's tokenizer."
    )
    split: str = Field("train", min_length=1, description="Split to read where a data set has several.")
    configuration: str = Field("", description="Configuration to read where a data set's card names several.")
    held_out_share: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Share of the rows that is held out from training and used to evaluate the result.",
        json_schema_extra={"unit": "share of 1"},
    )


class QuantizeConfig(StepConfig):
    """How the frozen base model is stored."""

    bits: Literal[4, 8, 16] = Field(
        4,
        description="4 trains QLoRA on NF4 weights with double quantisation, 8 trains LoRA on LLM.int8 weights, 16 "
        "plain LoRA.",
        json_schema_extra={"unit": "bits per weight"},
    )

    @field_validator("bits", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """A pipeline hands numbers over as doubles: 4.0 is 4."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


class TrainConfig(StepConfig):
    """How the adapter is trained."""

    epochs: float = Field(1.0, gt=0, le=1000, description="How often training goes through all rows.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    rank: int = Field(64, ge=1, le=1024, description="Rank of the adapter's matrices.")
    micro_batch: int = Field(
        4,
        ge=1,
        le=1024,
        description="Sequences of max_tokens that the GPU processes at once. The engine tune16 splits a step's "
        "micro_batch x gradient_accumulation sequences as is fastest by the memory plan.",
        json_schema_extra={"unit": "sequences"},
    )
    num_gpus: int = Field(
        1,
        ge=0,
        le=16,
        description="GPUs per pod; each takes micro_batch sequences of every batch. 0 trains and evaluates on the CPU, "
        "for tiny models or to try a cluster without GPUs.",
        json_schema_extra={"unit": "GPUs"},
    )
    num_nodes: int = Field(
        1,
        ge=1,
        le=64,
        description="Nodes that train together, each with num_gpus GPUs; more than 1 needs Kubeflow's trainer.",
        json_schema_extra={"unit": "nodes"},
    )
    alpha: float = Field(16, gt=0, le=4096, description="LoRA alpha: the adapter's output is scaled by alpha / rank.")
    dropout: Share = Field(0.1, description="Dropout on the adapter's input.")
    rank_stabilized: bool = Field(False, description="Scale by alpha / sqrt(rank) instead (rsLoRA).")
    target_modules: str = Field(
        "all-linear",
        min_length=1,
        description="Layers that get an adapter: all-linear, or names with commas such as q_proj,v_proj.",
    )
    gradient_accumulation: int = Field(
        1,
        ge=1,
        le=4096,
        description="Micro-batches whose gradients are accumulated for one optimiser step.",
        json_schema_extra={"unit": "micro-batches"},
    )
    schedule: Literal["constant", "cosine"] = Field("constant", description="Schedule of the learning rate.")
    warmup_share: Share = Field(0.03, description="Share of the steps over which the learning rate rises to its peak.")
    max_gradient_norm: float = Field(0.3, gt=0, le=1e6, description="Gradients are scaled down to this norm.")
    weight_decay: float = Field(0.001, ge=0, lt=1, description="Weight decay of AdamW.")
    optimizer: Literal["auto", "paged_adamw_8bit", "adamw"] = Field(
        "auto", description="auto is paged 8-bit AdamW on a GPU and plain AdamW without one."
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Number format of the computation; auto is bfloat16 if the device has it in hardware, else float16 "
        "on a GPU and float32 on a CPU.",
    )
    activation_checkpointing: bool = Field(
        True,
        description="With engine trl: keep only layer boundaries and recompute the rest in the backward pass. "
        "The engine tune16 keeps as much as fits.",
    )
    engine: Literal["tune16", "trl"] = Field(
        "tune16",
        description="tune16 trains with fused layers and uses all available memory; trl is plain TRL and PEFT, the "
        "reference.",
    )
    packing: bool = Field(True, description="Fill each micro-batch with rows, which do not attend to each other.")
    method: Literal["sft", "distill"] = Field(
        "sft",
        description="sft learns the answers of the data; distill learns, on the same answers, the probabilities that a "
        "larger teacher gives to every next token.",
    )
    teacher: str = Field(
        "",
        description="With method distill: the model to learn from, named as base_model is, with the same "
        "vocabulary. It is kept in 4 bits beside the student.",
    )
    num_evaluations: int = Field(
        4, ge=1, le=1000, description="Times that the held-out loss is measured.", json_schema_extra={"unit": "times"}
    )
    wandb_project: str = Field(
        "", description="Weights & Biases project to log to; empty is off. WANDB_MODE=offline works without network."
    )
    checkpoint_minutes: float = Field(
        5,
        gt=0,
        le=1440,
        description="Longest time between checkpoints, and so the most work that a killed run loses.",
        json_schema_extra={"unit": "minutes"},
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of everything random.")

    @property
    def processes_per_node(self) -> int:
        """Processes that train on one node: one for each GPU, or one on the CPU."""
        return max(1, self.num_gpus)

    @property
    def num_processes(self) -> int:
        """Processes that train together, on all nodes."""
        return self.processes_per_node * self.num_nodes

    @model_validator(mode="after")
    def _teaches_one_student(self) -> Self:
        if (self.method == "distill") != bool(self.teacher):
            raise ValueError(
                "train.teacher belongs to train.method distill: set both or neither (in the form: more_train_options)"
            )
        if self.teacher and self.num_processes > 1:
            raise ValueError("train.method distill trains on one GPU: set train.num_gpus and train.num_nodes to 1")
        return self


class EvaluateConfig(StepConfig):
    """How the result is evaluated."""

    minimum_improvement: Share = Field(
        0.01, description="Share by which the held-out loss must fall below the base model's for a promotion."
    )
    minimum_rows: int = Field(
        10, ge=1, le=1_000_000, description="Held-out rows that a promotion needs.", json_schema_extra={"unit": "rows"}
    )
    replace_other_base: bool = Field(
        False,
        description="Let the result replace a champion of another base model, though the two cannot be compared.",
    )
    num_rows: int = Field(
        500, ge=1, le=1_000_000, description="Held-out rows that are scored.", json_schema_extra={"unit": "rows"}
    )
    num_prompts: int = Field(
        50,
        ge=10,
        le=100_000,
        description="Held-out prompts that both models answer.",
        json_schema_extra={"unit": "prompts"},
    )
    max_new_tokens: int = Field(128, ge=1, le=8192, description="Longest answer.", json_schema_extra={"unit": "tokens"})
    batch_size: int = Field(
        8,
        ge=1,
        le=1024,
        description="Rows or prompts per batch; fewer where the GPU's memory requires it.",
        json_schema_extra={"unit": "rows"},
    )


class MergeConfig(StepConfig):
    """How the merged weights are written."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Number format of the merged weights; auto is the base model's own."
    )


# llama.cpp's quantisations that need no importance matrix, from the largest file to the smallest.
QUANTIZATIONS = (
    *("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_K_S", "Q5_0", "Q4_1", "Q4_K_M", "Q4_K_S", "Q4_0"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
)


class ConvertConfig(StepConfig):
    """Which GGUF files are made."""

    quantizations: str = Field(
        "Q4_K_M,Q5_K_M",
        description="GGUF files to make for llama.cpp, by its names with commas, such as Q4_K_M,Q5_K_M,Q8_0; empty is "
        "none.",
    )

    @field_validator("quantizations")
    @classmethod
    def _known(cls, value: str) -> str:
        for name in _split(value):
            if name not in QUANTIZATIONS:
                raise ValueError(f"unknown quantisation {name!r}; known: {', '.join(QUANTIZATIONS)}")
        return ",".join(dict.fromkeys(_split(value)))

    @property
    def names(self) -> list[str]:
        """The quantisations one by one."""
        return _split(self.quantizations)


_SUFFIX = re.compile(r"(\.(jsonl|ndjson|json|csv|parquet))?(\.(gz|bz2|xz|zst))?$")
_LONGEST_MODEL_NAME = 100  # characters: names made from it must fit the 255 of a model registry
_SERVER = re.compile(r"https?://[^/\s]+/?")
_PATH_PART = re.compile(r"[A-Za-z0-9._-]+")


def derived_path(preflight: PreflightConfig) -> str:
    """The default path of a result, which no other model or data set has."""
    names = [re.split(r"[@#]", name)[0].rstrip("/") for name in (preflight.model, preflight.data)]
    last = [_SUFFIX.sub("", name.rpartition("/")[2].lower()) for name in names]
    model, data = (re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unnamed" for name in last)
    mark = hashlib.sha256("\n".join(names).encode()).hexdigest()[:6]  # others may have the same last part
    # With "-predictor-<namespace>" an endpoint's label, of at most 63 characters.
    return f"tune16/{model[:22].rstrip('-')}-{data[:16].rstrip('-')}-{mark}"


class UploadConfig(StepConfig):
    """Where the result goes."""

    path: str = Field(
        description="Folder in the connection's bucket for this model's versions, as prefix/model-name. Each base "
        "model has its own; a recipe that names none gets tune16/<model>-<data>-<mark>.",
    )

    @field_validator("path")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        parts = value.split("/")
        if len(parts) < 2 or not all(_PATH_PART.fullmatch(part) and set(part) != {"."} for part in parts):
            raise ValueError(
                "write it as prefix/model-name, such as team/llama-2-7b-support: letters, digits, '.', '_' and '-', "
                "and no slash at either end"
            )
        if len(parts[-1]) > _LONGEST_MODEL_NAME:
            raise ValueError(f"its last part has {len(parts[-1])} characters; the limit is {_LONGEST_MODEL_NAME}")
        return value


class RegisterConfig(StepConfig):
    """Where the result is registered."""

    server: str = Field(
        "",
        description="Address of the model registry's REST service, such as "
        "https://modelregistry-rest.apps.example.com; empty registers nothing.",
    )

    @field_validator("server")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if value and not _SERVER.fullmatch(value):
            raise ValueError(
                "write https:// or http:// and the host, such as https://registry.example.com, without a path"
            )
        return value


class DeployConfig(StepConfig):
    """How the result is served."""

    runtime: Literal["", "vllm", "vllm-adapter", "llama.cpp", "llama.cpp-gpu"] = Field(
        "",
        description="Server for the champion: vllm (merged weights, large GPUs), vllm-adapter (base model and "
        "adapter), llama.cpp (the first GGUF file, on CPUs), llama.cpp-gpu (the same on a 16 GB GPU); empty: none.",
    )


class ClusterConfig(StepConfig):
    """What the cluster provides: secrets by name, and where the GPU steps may run."""

    connection: str = Field(
        "tune16-connection",
        min_length=1,
        description="Name of the Secret with the S3 connection (AWS_ACCESS_KEY_ID and so on).",
    )
    tokens: str = Field(
        "tune16-tokens",
        min_length=1,
        description="Name of the Secret with HF_TOKEN for gated models and WANDB_API_KEY for Weights & Biases; it need "
        "not exist.",
    )

    @field_validator("node_selector", "tolerations", mode="before")
    @classmethod
    def _as_json(cls, value: Any) -> Any:
        """What arrived as text, as some clients of the pipeline server send it."""
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError:
            raise ValueError("it is not valid JSON") from None

    node_selector: dict[str, str] = Field({}, description="Labels of the nodes that GPU steps may run on.")
    tolerations: list[dict[str, Any]] = Field(
        [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}],
        description="Taints that GPU steps tolerate, as in a pod.",
    )


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `register` is a method of abstract classes, which a recipe never calls

    class Recipe(StepConfig):
        """One fine-tune from end to end: the settings of every step."""

        description: str = Field("", description="One sentence on what the recipe does.")
        setup: Literal["", "demo"] = Field(
            "", description="What to upload to the bucket before the run; demo: the demo's base model."
        )
        preflight: PreflightConfig = PreflightConfig()
        prepare: PrepareConfig = PrepareConfig()
        quantize: QuantizeConfig = QuantizeConfig()
        train: TrainConfig = TrainConfig()
        evaluate: EvaluateConfig = EvaluateConfig()
        merge: MergeConfig = MergeConfig()
        convert: ConvertConfig = ConvertConfig()
        upload: UploadConfig = UploadConfig(path=derived_path(PreflightConfig()))
        register: RegisterConfig = RegisterConfig()
        deploy: DeployConfig = DeployConfig()
        cluster: ClusterConfig = ClusterConfig()

        @field_validator("*", mode="before")
        @classmethod
        def _empty_section(cls, value: Any) -> Any:
            """A section of a recipe whose lines are all commented out is an empty one."""
            return {} if value is None else value

        @model_validator(mode="before")
        @classmethod
        def _has_a_place(cls, values: Any) -> Any:
            """A recipe without upload.path gets one that no other model or data set has."""
            if not isinstance(values, dict):
                return values
            inputs, upload = values.get("preflight") or {}, values.get("upload") or {}
            if isinstance(upload, UploadConfig) or not isinstance(upload, dict) or "path" in upload:
                return values
            try:
                preflight = PreflightConfig.model_validate(inputs)
            except ValidationError:
                return {**values, "upload": {"path": "tune16/unnamed", **upload}}  # errors are reported at their key
            return {**values, "upload": {"path": derived_path(preflight), **upload}}

        @model_validator(mode="after")
        def _has_what_it_serves(self) -> Self:
            if self.deploy.runtime.startswith("llama.cpp") and not self.convert.names:
                raise ValueError(
                    f"deploy.runtime {self.deploy.runtime} (in the form: serving_runtime) serves a GGUF file, but "
                    "convert.quantizations (gguf_quantizations) names none"
                )
            return self


def step_name(cls: type[StepConfig]) -> str:
    """The step that a model belongs to: ``train`` for :class:`TrainConfig`."""
    return cls.__name__.removesuffix("Config").lower()


# The pipeline's form: each field and the setting that it fills. The pages that show it sort the fields by name, and
# some show nothing beside it: so the names say what to fill in, what matters most comes first, the cluster's last.
FORM = {
    "base_model": "preflight.model",
    "dataset": "preflight.data",
    "destination_path": "upload.path",
    "epochs": "train.epochs",
    "gguf_quantizations": "convert.quantizations",
    "gpu_memory_gib": "preflight.gpu_memory",
    "learning_rate": "train.learning_rate",
    "load_in_bits": "quantize.bits",
    "lora_rank": "train.rank",
    "max_tokens_per_row": "prepare.max_tokens",
    "merged_dtype": "merge.dtype",
    "more_evaluate_options": "evaluate.options",
    "more_prepare_options": "prepare.options",
    "more_train_options": "train.options",
    "registry_url": "register.server",
    "serving_runtime": "deploy.runtime",
    "with_connection_secret": "cluster.connection",
    "with_node_selector": "cluster.node_selector",
    "with_tokens_secret": "cluster.tokens",
    "with_tolerations": "cluster.tolerations",
}
_OPTIONS = "options"  # of a step: what the form has no field of its own for, as one JSON object
_FIELDS = {setting: name for name, setting in FORM.items()}

CONFIG_OF_STEP: dict[str, type[StepConfig]] = {
    step_name(cls): cls
    for cls in (
        PreflightConfig,
        PrepareConfig,
        QuantizeConfig,
        TrainConfig,
        EvaluateConfig,
        MergeConfig,
        ConvertConfig,
        UploadConfig,
        RegisterConfig,
        DeployConfig,
        ClusterConfig,
    )
}


def form_help(name: str) -> str:
    """The help of a form field such as ``epochs``: its config field's description."""
    step, _, field = FORM[name].partition(".")
    if field == _OPTIONS:
        return f"More settings of the step {step} as JSON; components/KNOBS.md lists them."
    return str(CONFIG_OF_STEP[step].model_fields[field].description)


def form_field(setting: str) -> str:
    """Where the form has a setting such as ``train.epochs``: its field, or its place among a step's other options."""
    step, _, field = setting.partition(".")
    if setting in _FIELDS:
        return _FIELDS[setting]
    options = _FIELDS.get(f"{step}.{_OPTIONS}")
    return f"{field} in {options}" if options else ""


def form_values(recipe: Recipe) -> dict[str, Any]:
    """The form filled in from a recipe; what is set beyond its fields goes into the options of its step."""
    values: dict[str, Any] = {}
    for name, setting in FORM.items():
        step, _, field = setting.partition(".")
        settings: StepConfig = getattr(recipe, step)
        if field == _OPTIONS:
            changed = settings.model_dump(exclude_defaults=True)
            values[name] = {key: value for key, value in changed.items() if f"{step}.{key}" not in _FIELDS}
        else:
            values[name] = getattr(settings, field)
    return values


def read_form(form: dict[str, Any]) -> "Recipe":
    """The recipe of a filled-in form, of which every setting is checked.

    Raises:
        Tune16Error: a setting is unknown, given twice or out of its limits, or two do not belong together.
    """
    given: dict[str, dict[str, Any]] = {step: {} for step in CONFIG_OF_STEP}
    for name, value in form.items():
        step, _, field = FORM[name].partition(".")
        given[step][field] = value
    sections, faults = {}, []
    for step, cls in CONFIG_OF_STEP.items():
        try:
            sections[step] = cls.load(given[step].pop(_OPTIONS, None), **given[step])
        except Tune16Error as error:
            faults.append(str(error))
    if faults:
        raise Tune16Error("\n".join(faults))
    return parse(Recipe, sections, where="form")


def form_parameters() -> dict[str, tuple[type, Any]]:
    """Each field of the form with its type and its default, which is that of its setting; None is none."""
    parameters: dict[str, tuple[type, Any]] = {}
    for name, setting in FORM.items():
        step, _, field = setting.partition(".")
        if field == _OPTIONS:
            parameters[name] = (dict, {})
            continue
        info = CONFIG_OF_STEP[step].model_fields[field]
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        parameters[name] = (str if default is None else type(default), default)
    return parameters


def parse(cls: type[Config], values: Any, where: str, form_of: str = "") -> Config:
    """Validate `values` against `cls`; `where` names their origin in messages, `form_of` the step whose form they fill.

    Raises:
        Tune16Error: one line per fault, with a suggestion for a misspelt key.
    """
    if not isinstance(values, dict):
        raise Tune16Error(f"{where}: expected keys and values, got {type(values).__name__}.")
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [f"{where}: {_explain(cls, fault)}{_in_the_form(form_of, fault)}" for fault in error.errors()]
        raise Tune16Error("\n".join(lines)) from None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        Tune16Error: it is missing or not valid YAML, or a setting is wrong.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _YamlWithFloats)
    except OSError as error:
        raise Tune16Error(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise Tune16Error(f"{path}: not UTF-8 text. Save the recipe as UTF-8.") from None
    except yaml.YAMLError as error:
        raise Tune16Error(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return parse(Recipe, {} if content is None else content, where=str(path))


def override(recipe: Recipe, settings: list[str]) -> Recipe:
    """Apply ``step.field=value`` settings, values in YAML, to a recipe.

    Raises:
        Tune16Error: a setting has no such form, names no field, or its value is out of limits.
    """
    content = recipe.model_dump()
    if recipe.upload.path == derived_path(recipe.preflight):
        del content["upload"]["path"]  # it follows the model and the data
    for name, value in read_assignments(settings).items():
        step, dot, field = name.partition(".")
        if not dot:
            raise Tune16Error(f"--set {name}: write step.field=value, for example train.epochs=3.")
        if step not in CONFIG_OF_STEP:
            raise Tune16Error(f"--set {name}: there is no step '{step}'.{_suggest(step, CONFIG_OF_STEP)}")
        content[step][field] = value
    return parse(Recipe, content, where="--set")


def read_assignments(assignments: list[str]) -> dict[str, Any]:
    """``["rank=8", "packing=false"]`` as a dictionary; values are YAML.

    Raises:
        Tune16Error: one lacks the equals sign, or its value is not valid YAML.
    """
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise Tune16Error(f"--set {assignment}: write name=value.")
        try:
            values[name] = yaml.load(text, _YamlWithFloats)
        except yaml.YAMLError:
            raise Tune16Error(f"--set {assignment}: the value is not valid YAML.") from None
    return values


def _split(names: str) -> list[str]:
    """Comma-separated names as a list, in capitals."""
    return [name.strip().upper() for name in names.split(",") if name.strip()]


class _YamlWithFloats(yaml.SafeLoader):
    """YAML 1.1 reads 2e-4 as text, because it has no point; people mean a number."""


_YamlWithFloats.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _explain(cls: type[BaseModel], fault: Any) -> str:
    """One of pydantic's errors as a message: the key's path, what was wrong, what was received."""
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{key}'.{_suggest(location[-1], _fields_at(cls, location[:-1]))}"
    message = fault["msg"].removeprefix("Value error, ")  # pydantic's prefix
    return f"'{key}' is {fault['input']!r}: {message[0].lower()}{message[1:]}." if key else f"{message}."


def _in_the_form(step: str, fault: Any) -> str:
    """The form field with the error, for users of the form."""
    field = form_field(f"{step}.{fault['loc'][0]}") if step and fault["loc"] else ""
    return f" In the form: {field}." if field else ""


def _fields_at(cls: type[BaseModel], location: list[str]) -> dict[str, Any]:
    for part in location:
        annotation = cls.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        cls = annotation
    return cls.model_fields


def _suggest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."
