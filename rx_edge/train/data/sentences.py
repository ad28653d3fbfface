"""Keep the sentences that describe this radiograph.

Report-like text from case collections mixes findings with history, laboratory values and CT. A
model cannot see those in the image; a target that holds them teaches it to invent. The rules are
word lists on purpose: they can be read, and what they drop is counted.
"""

from __future__ import annotations

import re

_SPLIT = re.compile(r"(?<=[.!?])[\s.]+(?=[A-Z])")
_IMAGING = re.compile(
    r"opaci|consolidat|infiltrat|effusion|pneumothora|cardiomegal|cardiac|heart|mediastin|hilar|hilum"
    r"|\blungs?\b|\blobes?\b|\blobar\b|atelecta|nodul|interstitial|reticul|ground.?glass|cavit|bilateral"
    r"|thicken|shadow|diaphragm|costophren|pleural|\btubes?\b|\btip\b|catheter|trachea|airspace"
    r"|air space|alveolar|radiograph|x.?ray|markings|normal findings|volume",
    re.IGNORECASE,
)
_NOT_THIS_IMAGE = re.compile(
    r"\bCTs?\b|tomograph|\bHRCT\b|\bMRI?\b|ultraso|echocardio|\bECG\b"
    r"|year.?old|\bman\b|\bwoman\b|\bmale\b|\bfemale\b|patient|\bhe\b|\bshe\b|\bhis\b|\bher\b"
    r"|histor|present(?:ed|ing|ation)|admi(?:tted|ssion)|discharg|hospital|emergency|treat|therap"
    r"|fever|cough|dyspn|symptom|saturat|SpO|\bPCR\b|swab|antibod|serolog|positive|negative for"
    r"|\bday\b|\bdays\b|\bweeks?\b|\bmonths?\b|january|february|march|april|\b20[12]\d\b|died|death"
    r"|diagnos|surg|biops|culture|bronchoscop|leukocyt|lymph|blood|laborator|\bfig|arrow|\([a-f]\)"
    r"|covid|corona|sars|\bvirus|case |follow.?up|previous|prior|compar|improve|progress"
    r"|resol|chang|develop|crepitat|crackle|breath|victim|later\b|initial|serial|suspect|suggest"
    r"|consistent with|compatible|due to|likely|https?:",
    re.IGNORECASE,
)


# "Chest X-ray on admission showed bilateral opacities": what follows the verb is the finding
_SHOWED = re.compile(
    r"(?:x.?rays?|radiograph\w*|\bCXRs?)\b[^.;]*?"
    r"\b(?:show(?:ed|s|ing)|reveal(?:ed|s|ing)|demonstrat(?:ed|es|ing))\s+(?P<finding>[^.;]+)",
    re.IGNORECASE,
)

_LABEL = re.compile(r"^(?:imaging notes|x.?ray|chest x.?ray|CXR|findings)\s*:\s*", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """Sentences of `text`, whitespace normalised, each with its final full stop."""
    parts = (" ".join(p.split()) for p in _SPLIT.split(text.strip()))
    return [p if p[-1] in ".!?" else f"{p}." for p in parts if p]


def imaging_sentences(text: str) -> list[str]:
    """The sentences that describe a chest radiograph and nothing else."""
    kept = []
    for sentence in split_sentences(text):
        body = _LABEL.sub("", sentence)
        showed = _SHOWED.search(body)
        if showed:
            body = re.sub(r"^(?:that|the presence of)\s+", "", showed["finding"].strip()) + "."
        if (
            2 <= len(body.split()) <= 40
            and _IMAGING.search(body)
            and not _NOT_THIS_IMAGE.search(body)
        ):
            kept.append(body[0].upper() + body[1:])
    return kept
