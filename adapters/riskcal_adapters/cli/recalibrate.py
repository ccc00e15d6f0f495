"""`riskcal recalibrate`: what a policy was certified by, again for another model."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import riskcal
from riskcal import RiskcalError, internal
from riskcal.calibration import PROCEDURES, TESTS
from riskcal.policy import Certificate, ExitPolicy, Sampling
from riskcal.records import Runs
from riskcal_adapters.cli.decoders import DecoderOption, HeadsOption, ModelOption, asked_decoder
from riskcal_adapters.cli.losses import parse_loss
from riskcal_adapters.cli.prompts import read_prompts
from riskcal_adapters.cli.record import parse_thresholds
from riskcal_adapters.fingerprint import BINDING
from riskcal_adapters.recording.folder import SETTINGS_FILE, name_of, read_settings
from riskcal_adapters.recording.prompts import needs_references
from riskcal_adapters.recording.record import record

#: What says for which model a policy is, and what calibration finds.
_FOUND = ("threshold", "thresholds", "learned", "certificate", "n_layers", *BINDING)
#: Costs that a recording measures.
_MEASURED = ("layers", "tokens", "seconds")


def recalibrate(
    policy: Annotated[Path, typer.Argument(help="The certified policy.", show_default=False)],
    prompts: Annotated[
        Path,
        typer.Option(help="As for `riskcal record`; fresh ones or the same.", show_default=False),
    ],
    new_records: Annotated[
        Path, typer.Option(help="Folder for them; goes on with one begun.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new policy.", show_default=False)],
    decoder: DecoderOption = None,
    model: ModelOption = None,
    heads: HeadsOption = None,
    records: Annotated[
        Path | None,
        typer.Option(
            help="The folder that it was calibrated on: says the thresholds, and what layers it took.",
            show_default="--thresholds",
        ),
    ] = None,
    thresholds: Annotated[
        str, typer.Option(help="Without --records: as for `riskcal record`.")
    ] = "0:1:.05",
    loss: Annotated[str, typer.Option(help="As for `riskcal record`.")] = "token-errors",
    sampling_temperature: Annotated[
        float | None,
        typer.Option(
            help="Draw tokens at this temperature; 0 is greedy.", show_default="the policy's"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Prompts generated together; with deepest batches that of --records.",
            show_default="1",
        ),
    ] = None,
) -> None:
    """Record and calibrate as POLICY was, for new weights, another tokenizer or temperature, and say what changed.

    Exit status 1: nothing could be certified, and the policy written is the full model.
    """
    old = ExitPolicy.load(policy)
    certificate = repeatable(old, policy)
    before = None if records is None else read_settings(records / SETTINGS_FILE)
    was = None if records is None else records_of(records, certificate)
    distance, error = parse_loss(loss)
    with_risk = certificate.objective not in ("textual", "selective")
    if before is not None:
        _same_loss("dissimilarity", distance, before, records)
        if with_risk:
            _same_loss("risk", error, before, records)
        _all_candidates(certificate, before, policy)
    template = candidates(old, before, policy)
    template = template.model_copy(update=_sampling(old, sampling_temperature))
    record(
        read_prompts(prompts, references=with_risk and needs_references(error)),
        asked_decoder(decoder, model, heads),
        parse_thresholds(thresholds) if before is None else before["thresholds"],
        new_records,
        policy=template,
        dissimilarity=distance,
        risk=error if with_risk else None,
        **batches(old, before, batch_size),
    )
    runs = Runs.read(sorted(new_records.glob("runs-*.parquet")))
    calibration: Any = riskcal.calibrate(runs, **internal.arguments_of(certificate))
    new = calibration.policy()
    new.save(out)
    print(calibration.message)
    if certificate.asked is None:
        print("The certificate is from before the cost was kept: layers was taken.")
    for line in changes(old, new):
        print(line)
    if was is not None:
        print(f"layers a token: {_layers(was, old):.2f} -> {_layers(runs, new):.2f}")
    print(f"Policy written to {out}")
    raise typer.Exit(0 if calibration.certified else 1)


def records_of(folder: Path, certificate: Certificate) -> Runs:
    """The records in a folder, if they are those of the certificate."""
    found = Runs.read(sorted(folder.glob("runs-*.parquet")))
    if found.digest() != certificate.records_digest:
        raise RiskcalError(
            f"--records: {folder} holds other records ({found.digest()}) than the policy was calibrated on "
            f"({certificate.records_digest}); give their folder, or leave it out and name --thresholds."
        )
    return found


def candidates(policy: ExitPolicy, before: dict[str, Any] | None, path: Path) -> ExitPolicy:
    """What all candidates had in common, for no model yet.

    Raises
    ------
    RiskcalError
        For the full model, where nothing was certified: it does not say the schedule of what was tested.
    """
    if policy.is_full_model:
        if before is None:
            raise RiskcalError(
                f"{path}: is the full model, which does not say the schedule and the first layer of what was tested; give "
                "--records, the folder that it was calibrated on."
            )
        said = before["policy"] | {"max_new_tokens": before["max_new_tokens"]}
        policy = ExitPolicy.model_validate(said)
    left_out = (*_FOUND, "schema_version")
    return ExitPolicy(
        **{name: getattr(policy, name) for name in ExitPolicy.model_fields if name not in left_out}
    )


def batches(policy: ExitPolicy, before: dict[str, Any] | None, asked: int | None) -> dict[str, Any]:
    """How many prompts are decoded together: free where rows do not depend on it, else as it was.

    Raises
    ------
    RiskcalError
        For ``"deepest"`` batches where nothing says how large they were, or another size is asked for.
    """
    if policy.batching != "deepest":
        return {"batch_size": 1 if asked is None else asked}
    if before is None:
        raise RiskcalError(
            "batching: in 'deepest' batches a row depends on how many are decoded together, which the policy does not say; "
            "give --records, the folder that it was calibrated on."
        )
    size = before["batch_size"]
    if asked not in (None, size):
        raise RiskcalError(
            f"--batch-size: {asked}, but the policy was calibrated on 'deepest' batches of {size}; give {size}, or leave it out."
        )
    # a batch never goes beyond its file, so that files are as large as they were too
    return {"batch_size": size, "shard_prompts": before["shard_prompts"]}


def _same_loss(
    name: str, loss: Callable[..., float], before: dict[str, Any], records: Path | None
) -> None:
    if before[name] != name_of(loss):
        raise RiskcalError(
            f"--loss: {records} was recorded with {before[name]}, not {name_of(loss)}; give the same."
        )


def _all_candidates(certificate: Certificate, before: dict[str, Any], path: Path) -> None:
    """Refuse a certificate that chose among others than one recording's thresholds."""
    there = len(before["thresholds"])
    if certificate.k != there:
        raise RiskcalError(
            f"{path}: was chosen among {certificate.k} candidates, the recording has {there} thresholds; record anew, and call "
            "riskcal.calibrate as then."
        )


def changes(old: ExitPolicy, new: ExitPolicy) -> list[str]:
    """A line for every setting in which two policies differ, and for their certificates' sizes; thresholds always."""
    held = [one.model_dump(mode="json", exclude={"certificate"}) for one in (old, new)]
    lines = [f"threshold: {held[0].pop('threshold')} -> {held[1].pop('threshold')}"]
    configs = [one.pop("config") or {} for one in held]
    pairs = [(name, held[0][name], held[1][name]) for name in held[0]]
    pairs += [
        (f"config.{name}", configs[0].get(name), configs[1].get(name))
        for name in sorted(configs[0].keys() | configs[1].keys())
    ]
    pairs += [
        (f"certificate.{name}", getattr(old.certificate, name), getattr(new.certificate, name))
        for name in ("n", "k", "pvalue")
    ]
    return lines + [f"{name}: {was} -> {now}" for name, was, now in pairs if was != now]


def repeatable(policy: ExitPolicy, path: Path) -> Certificate:
    """The certificate, if it says all that is needed to repeat it."""
    certificate = policy.certificate
    if certificate is None:
        raise RiskcalError(
            f"{path}: is not certified, so that there is nothing to repeat; use riskcal record and riskcal calibrate."
        )
    asked = certificate.asked
    whys = {
        "certified for several risks": isinstance(certificate.delta, dict),
        "certified with a threshold for each exit": certificate.objective == "agreement"
        or policy.thresholds is not None,
        f"certified by a test that no records of prompts have ({certificate.test})": (
            certificate.test.removesuffix("_with_proxy") not in TESTS
        ),
        "certified with a proxy, whose numbers it does not hold": certificate.test.endswith(
            "_with_proxy"
        ),
        f"certified in an order of its own ({certificate.procedure})": bool(
            certificate.pilot_n
            or certificate.preregistered
            or certificate.procedure not in PROCEDURES
        ),
        "of another system, whose coordinates it has": bool(policy.coordinates),
        "of another system, where low thresholds are the strict ones": policy.lower_is_stricter,
        "certified on a recording that stopped early": certificate.stopped is not None,
        "certified on an array of losses": certificate.objective == "losses",
    }
    if asked is not None:
        whys |= {
            f"chosen by {asked.cost!r}, a cost that riskcal record does not measure": (
                asked.cost not in _MEASURED
            ),
            "certified with a budget": bool(asked.largest),
            f"certified over candidates told apart by {', '.join(asked.candidate_columns)}": bool(
                asked.candidate_columns
            ),
        }
    why = next((text for text, holds in whys.items() if holds), None)
    if why is not None:
        raise RiskcalError(f"{path}: is {why}; record anew, and call riskcal.calibrate as then.")
    return certificate


def _sampling(policy: ExitPolicy, temperature: float | None) -> dict[str, Any]:
    if temperature is None:
        return {}
    if temperature == 0:
        return {"sampling": None}
    drawing = policy.sampling or Sampling()
    return {"sampling": Sampling(**drawing.model_dump() | {"temperature": temperature})}


def _layers(runs: Runs, policy: ExitPolicy) -> float:
    """Mean layers a token at a policy's threshold, prompts counting alike."""
    frame = runs.to_frame()
    return float(frame["layers"][frame["threshold"] == policy.threshold].mean())
