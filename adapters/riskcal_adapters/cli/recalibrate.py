"""`riskcal recalibrate`: what a policy was certified by, again for another model."""

from pathlib import Path
from typing import Annotated, Any

import typer

import riskcal
from riskcal import RiskcalError
from riskcal.calibration import PROCEDURES
from riskcal.policy import Certificate, ExitPolicy, Sampling
from riskcal.records import Runs
from riskcal_adapters.cli.decoders import DecoderOption, HeadsOption, ModelOption, asked_decoder
from riskcal_adapters.cli.losses import parse_loss
from riskcal_adapters.cli.prompts import read_prompts
from riskcal_adapters.cli.record import parse_thresholds
from riskcal_adapters.recording.folder import SETTINGS_FILE, name_of, read_settings
from riskcal_adapters.recording.prompts import needs_references
from riskcal_adapters.recording.protocol import BINDING
from riskcal_adapters.recording.record import record

#: What says for which model a policy is, and what calibration finds.
_FOUND = ("threshold", "thresholds", "certificate", "n_layers", *BINDING)


def recalibrate(
    policy: Annotated[Path, typer.Argument(help="The certified policy.", show_default=False)],
    prompts: Annotated[
        Path,
        typer.Option(help="As for `riskcal record`; fresh ones or the same.", show_default=False),
    ],
    new_records: Annotated[
        Path, typer.Option(help="Folder for them; goes on with one begun.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The new policy.", show_default=False)],
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
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 1,
) -> None:
    """Record and calibrate as POLICY was, for new weights, another tokenizer or temperature, and say what changed.

    Exit status 1: nothing could be certified, and the policy written is the full model.
    """
    old = ExitPolicy.load(policy)
    certificate = _repeatable(old, policy)
    before = None if records is None else read_settings(records / SETTINGS_FILE)
    distance, error = parse_loss(loss)
    if before is not None and before["dissimilarity"] != name_of(distance):
        raise RiskcalError(
            f"--loss: {records} was recorded with {before['dissimilarity']}, not {name_of(distance)}; give the same."
        )
    with_risk = certificate.objective not in ("textual", "selective")
    template = ExitPolicy(
        **{
            name: getattr(old, name)
            for name in ExitPolicy.model_fields
            if name not in _FOUND and name != "schema_version"
        }
        | _sampling(old, sampling_temperature)
    )
    record(
        read_prompts(prompts, references=with_risk and needs_references(error)),
        asked_decoder(decoder, model, heads),
        parse_thresholds(thresholds) if before is None else before["thresholds"],
        new_records,
        policy=template,
        batch_size=batch_size,
        dissimilarity=distance,
        risk=error if with_risk else None,
    )
    runs = Runs.read(sorted(new_records.glob("runs-*.parquet")))
    settings: dict[str, Any] = {"starts": certificate.starts} if certificate.starts > 1 else {}
    if certificate.weighting == "requests":
        settings |= {"weighting": "requests", "max_cluster": certificate.max_cluster}
    calibration: Any = riskcal.calibrate(
        runs,
        delta=certificate.delta,
        epsilon=certificate.epsilon,
        objective=certificate.objective,
        test=certificate.test,
        procedure=certificate.procedure,
        attempt=certificate.attempt,
        **settings,
    )
    new = calibration.policy()
    new.save(out)
    print(calibration.message)
    for line in changes(old, new):
        print(line)
    if records is not None:
        was = _layers(Runs.read(sorted(records.glob("runs-*.parquet"))), old)
        print(f"layers a token: {was:.2f} -> {_layers(runs, new):.2f}")
    print(f"Policy written to {out}")
    raise typer.Exit(0 if calibration.certified else 1)


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


def _repeatable(policy: ExitPolicy, path: Path) -> Certificate:
    """The certificate, if it says all that is needed to repeat it."""
    certificate, why = policy.certificate, None
    if certificate is None:
        raise RiskcalError(
            f"{path}: is not certified, so that there is nothing to repeat; use riskcal record and riskcal calibrate."
        )
    if isinstance(certificate.delta, dict):
        why = "certified for several risks"
    elif certificate.objective == "agreement" or policy.thresholds is not None:
        why = "certified with a threshold for each exit"
    elif (
        certificate.pilot_n or certificate.preregistered or certificate.procedure not in PROCEDURES
    ):
        why = f"certified in an order of its own ({certificate.procedure})"
    elif policy.coordinates:
        why = "of another system, whose coordinates it has"
    elif certificate.stopped is not None:
        why = "certified on a recording that stopped early"
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
