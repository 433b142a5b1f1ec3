"""The alarms of a run, as its log has them."""

from dataclasses import dataclass

from autoencoder.report.runs import Run


@dataclass
class RaisedAlarm:
    """An alarm from when it was raised to when it was cleared."""

    name: str
    """As a title."""
    message: str
    """With the figures at which it was raised; where it stands at the end, with those of the final evaluation."""
    remedy: str
    raised: int
    """Images seen when it was raised."""
    cleared: int | None = None
    """Images seen when it was cleared; None while it stands."""


def alarms(run: Run) -> list[RaisedAlarm]:
    """Every alarm that was raised, in order."""
    final = run.evaluation.get("alarms") or [] if run.status == "finished" else []
    at_end = {_title(str(told.get("name", ""))): str(told.get("message", "")) for told in final}
    every: list[RaisedAlarm] = []
    for line in run.lines:
        for told in line.get("raised") or []:
            name, message, remedy = (str(told.get(key, "")) for key in ("name", "message", "remedy"))
            every.append(RaisedAlarm(_title(name), message, remedy, line["images"]))
        for name in line.get("cleared") or []:
            for alarm in every:
                if alarm.name == _title(str(name)) and alarm.cleared is None:
                    alarm.cleared = line["images"]
    for alarm in every:
        if alarm.cleared is None:
            alarm.message = at_end.get(alarm.name, alarm.message)
    return every


def _title(name: str) -> str:
    """`dominating_kl` as Dominating KL."""
    words = " ".join("KL" if word == "kl" else word for word in name.split("_"))
    return words[:1].upper() + words[1:]
