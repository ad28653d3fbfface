"""What a report says, as facts: finding, present / absent / uncertain, and side.

Rule labels over the fourteen CheXpert observations (Irvin et al. 2019): a mention phrase, and
cue words for negation and uncertainty in the same clause. They are coarse, the same every time,
and the same for both texts, which is what a comparison of two drafts needs. They are not the
CheXpert labeller and not CheXbert, and are never called so.

Does not cover: severity, size, change over time, and devices other than as one group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Status = Literal["present", "absent", "uncertain"]
Side = Literal["", "left", "right", "both"]


@dataclass(frozen=True)
class Fact:
    """One finding as a report states it."""

    finding: str
    status: Status
    side: Side


# order matters inside a clause only for reading: every finding is looked for on its own
_MENTIONS = {
    "Enlarged Cardiomediastinum": r"(?:wide(?:n(?:ed|ing))?|enlarged|prominent)"
    r"[\w ]{0,20} mediastin\w+"
    r"|mediastin\w+[\w ]{0,12} (?:widen|enlarge)\w+",
    "Cardiomegaly": r"cardiomegaly|enlarge\w* (?:of the )?(?:cardiac|heart)"
    r"|(?:heart|cardiac silhouette)[\w ]{0,24} (?:enlarged|borderline)"
    r"|borderline (?:heart|cardiac)",
    "Lung Opacity": r"opaci\w+|infiltrat\w+|airspace disease|air ?space process|reticul\w+"
    r"|interstitial (?:markings|changes|disease|thickening)|ground.?glass|scar(?:s|ring)?\b",
    "Lung Lesion": r"nodul\w+|\bmass(?:es)?\b|lesions?\b|tumou?r\w*|cavit\w+",
    "Edema": r"(?:o?edema)\b|vascular congestion|fluid overload|heart failure",
    "Consolidation": r"consolidat\w+",
    "Pneumonia": r"pneumonia\b|pneumonic|bronchopneumonia|(?<!granulomatous )infecti\w+",
    "Atelectasis": r"atelecta\w+|volume loss|collaps\w+",
    "Pneumothorax": r"pneumothora\w+",
    "Pleural Effusion": r"(?:effusion)s?\b|pleural fluid|hydrothorax"
    r"|blunting of (?:the )?[\w ]{0,12}costophrenic",
    "Pleural Other": r"pleural (?:thickening|plaques?|scar\w*|calcif\w+)",
    "Fracture": r"fractur\w+",
    "Support Devices": r"\b(?:tubes?|catheters?|lines?|picc|pacemaker|pacers?|stents?|clips"
    r"|wires?|leads|drains?|port-?a-?cath|valves?|prosthe\w+|devices?)\b",
}
_NO_FINDING = (
    r"\b(?:no|negative for|without)(?: (?:\w+ )?evidence (?:of|for))? (?:acute|active) "
    r"(?!(?:bony|bone|osseous|skeletal)\b)(?:\w+ ){0,2}"
    r"(?:disease|process|abnormalit\w+|findings?|changes?)"
    r"|normal (?:chest|study|examination|findings)|lungs? (?:are|is) clear|clear lungs"
)
_NORMAL = {  # a normal organ is the absence of its finding, unless the sentence also names that
    "Cardiomegaly": r"(?:heart|cardiac|cardiomediastinal)[\w ,]{0,60} (?:normal|unremarkable)"
    r"|normal (?:heart|cardiac)|normal in size",
    "Lung Opacity": r"lungs?[\w ,]{0,20} clear|clear lungs",
    "Enlarged Cardiomediastinum": r"mediastin\w+[\w ,]{0,60} (?:normal|unremarkable)"
    r"|normal [\w ]{0,24}mediastin",
    "Pleural Effusion": r"costophrenic[\w ]{0,12} (?:clear|sharp)",
}
_NEGATION = re.compile(
    r"\b(?:no|not|without|negative for|free of|absen(?:t|ce)|clear of|denies|resolved|never"
    r"|rather than|nor|neither)\b(?! (?:(?:significant(?:ly)?|interval|appreciable) )*change)",
    re.IGNORECASE,
)
_NEGATION_AFTER = re.compile(
    r"\b(?:(?:is|are|was|were) not|(?:is|are) absent|has resolved|have resolved|excluded)\b",
    re.IGNORECASE,
)
_UNCERTAIN = re.compile(
    r"\b(?:may|might|could|possibl[ey]|probabl[ey]|likely|suspect\w*|suspicious|suggest\w*"
    r"|questionable|cannot (?:be )?(?:exclude|rule)\w*|not excluded|versus|vs|concerning"
    r"|worrisome|equivocal|unclear|perhaps|borderline)\b",
    re.IGNORECASE,
)
# where a report goes on to what a sign means: the doubt is about that, not about the sign
_EXPLAINED = ("Lung Opacity", "Lung Lesion", "Consolidation")
_EXPLANATION = re.compile(
    r"\b(?:(?:may|might|could|possibly|probably|likely) (?:represent|reflect|indicate|be (?:due|"
    r"secondary|related)|due|secondary|related)|suggest(?:s|ing|ive)"
    r"|(?:suspicious|concerning|worrisome) for)",
    re.IGNORECASE,
)
# where a negation stops: "no effusion but a large mass"
_TURN = re.compile(r"\b(?:but|however|although|except|there (?:is|are)|with)\b|[;:]", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_SIDE: dict[Side, re.Pattern[str]] = {
    "both": re.compile(r"\bbilateral(?:ly)?\b|\bboth\b|\bbi(?:basal|basilar|apical)\b", re.I),
    "left": re.compile(r"\bleft\b|\bleft-sided\b|\blingula\w*", re.I),
    "right": re.compile(r"\bright\b|\bright-sided\b", re.I),
}


def facts(text: str) -> frozenset[Fact]:
    """The facts of a report; a finding that it does not mention has none."""
    found: set[Fact] = set()
    for sentence in _SENTENCE.split(text):
        found |= _sentence_facts(sentence.strip())
    return frozenset(found)


def _sentence_facts(sentence: str) -> set[Fact]:
    found: set[Fact] = set()
    if re.search(_NO_FINDING, sentence, re.IGNORECASE):
        found.add(Fact("No Finding", "present", ""))
    for finding, pattern in _MENTIONS.items():
        for match in re.finditer(pattern, sentence, re.IGNORECASE):
            status = _status(finding, sentence, match.start(), match.end())
            side: Side = "" if status == "absent" else _side(sentence, match.start())
            found.add(Fact(finding, status, side))
    named = {fact.finding for fact in found}
    for finding, pattern in _NORMAL.items():
        if finding not in named and re.search(pattern, sentence, re.IGNORECASE):
            found.add(Fact(finding, "absent", ""))
    return found


def _status(finding: str, sentence: str, start: int, end: int) -> Status:
    before = sentence[:start]
    turns = list(_TURN.finditer(before))
    # with the mention: "the heart is not enlarged"
    clause = sentence[turns[-1].end() if turns else 0 : end]
    turn_after = _TURN.search(sentence, end)
    after = sentence[end : turn_after.start() if turn_after else len(sentence)]
    if re.search(r"cannot|not excluded", clause + after, re.IGNORECASE):
        return "uncertain"
    if _NEGATION.search(clause) or _NEGATION_AFTER.search(after):
        return "absent"
    if turns and re.match(r"with$", turns[-1].group(), re.I) and before.lower().endswith("no "):
        return "absent"
    if finding in _EXPLAINED:
        after = _EXPLANATION.split(after, maxsplit=1)[0]
    return "uncertain" if _UNCERTAIN.search(clause) or _UNCERTAIN.search(after) else "present"


def _side(sentence: str, at: int) -> Side:
    """The side word nearest to the mention; "left and right" is both."""
    places: list[tuple[int, Side]] = [
        (abs(match.start() - at), side)
        for side, pattern in _SIDE.items()
        for match in pattern.finditer(sentence)
    ]
    if not places:
        return ""
    if re.search(r"\b(?:left and right|right and left)\b", sentence, re.IGNORECASE):
        return "both"
    return min(places)[1]


@dataclass(frozen=True)
class Flips:
    """How two reports differ, counted in facts.

    Attributes:
        negation: findings stated by both, present (or uncertain) in one and absent in the other.
        side: findings present in both, on another side.
        finding: findings present in one that the other does not mention at all, and the reverse.
        facts: facts of the first report; what the counts are to be compared with.
    """

    negation: int
    side: int
    finding: int
    facts: int

    @property
    def total(self) -> int:
        """All flips."""
        return self.negation + self.side + self.finding


def flips(wanted: str, found: str) -> Flips:
    """Compare a report with the one that it should be."""
    a, b = _by_finding(wanted), _by_finding(found)
    negation = side = finding = 0
    for name in a.keys() | b.keys():
        one, other = a.get(name), b.get(name)
        if one is None or other is None:
            finding += 1
        elif {s == "absent" for s, _ in one} != {s == "absent" for s, _ in other}:
            negation += 1
        elif {where for _, where in one} != {where for _, where in other}:
            side += 1
    return Flips(negation, side, finding, sum(map(len, a.values())))


def _by_finding(text: str) -> dict[str, set[tuple[Status, Side]]]:
    grouped: dict[str, set[tuple[Status, Side]]] = {}
    for fact in facts(text):
        grouped.setdefault(fact.finding, set()).add((fact.status, fact.side))
    return grouped
