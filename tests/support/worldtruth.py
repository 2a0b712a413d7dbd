"""What is true in the miniature world, read off its facts: an independent judge of searches and of noise."""

import re

from zs_lightning.miniature.world import RELATIONS, SYNONYMS, make_world, sentences

WORLD = make_world(0)
QUESTIONS = {question.text: question for split in WORLD.questions().values() for question in split}
SUBJECTS = sorted(WORLD.kind, key=len, reverse=True)


def relations_in(text):
    return {r for r in RELATIONS if re.search(rf"\b({r}|{SYNONYMS[r]})\b", text.lower())}


def names_in(text):
    return [name for name in SUBJECTS if re.search(rf"\b{name}\b", text, re.IGNORECASE)]


def asked_facts(question_text, query):
    """The facts on the question's path that the query asks for: it names their subject and, if it names any relation,
    theirs."""
    question = QUESTIONS[question_text]
    subject, facts = question.subject, []
    for relation, object_ in zip(question.relations, question.objects, strict=True):
        named = relations_in(query)
        if subject in names_in(query) and (not named or relation in named):
            facts.append((subject, relation, object_))
        subject = object_
    return facts


def stated(fact, text):
    """Whether the text states the fact in either of its wordings; who is married is so both ways."""
    subject, relation, object_ = fact
    wordings = [*sentences(*fact)]
    if relation == "spouse":
        wordings += sentences(object_, relation, subject)
    return any(wording in text for wording in wordings)


def is_useful(question_text, query, texts):
    return any(stated(fact, text) for fact in asked_facts(question_text, query) for text in texts)


def is_of_kind(kind, question_text, query, texts):
    """Whether documents are what the name of a kind of noise says, for a query that asks for a fact."""
    facts = asked_facts(question_text, query)
    subjects = {fact[0] for fact in facts}
    if is_useful(question_text, query, texts):
        return False
    if kind == "off_topic":
        return not any(subjects & set(names_in(text)) for text in texts)
    if kind == "partial":
        return any(subjects & set(names_in(text)) for text in texts)
    wrong = [text for text in texts if any(_wrongly(fact, text) for fact in facts)]
    if kind == "contradicting":
        return bool(wrong)
    return bool(wrong) and all(re.match(r"In \d{4}: ", text) for text in texts)


def _wrongly(fact, text):
    """Whether the text states the fact's subject and relation with another object."""
    subject, relation, object_ = fact
    patterns = [rf"{subject} (?:{relation}|{SYNONYMS[relation]}) (.+)\.$"]
    if relation == "spouse":
        patterns.append(rf"(?:In \d+: )?(.+) (?:{relation}|{SYNONYMS[relation]}) {subject}\.$")
    found = [match[1] for pattern in patterns if (match := re.search(pattern, text))]
    return any(other != object_ for other in found)
