"""What a model is told that writes questions about passages, and answers them again.

In English for passages of any language: instruct models follow it best. There is no example, since
small models return it.
"""

# Dots in place of an example, which would be copied; the form comes last, where it is nearest.
WRITE = (
    "Write {count} quiz questions about facts that stand in this passage.\n\n"
    "Title: {title}\nPassage: {text}\n\nRules:\n"
    "- Write questions and answers in the language of the passage.\n"
    "- Each question is for somebody who has never seen the passage: name in full what it is "
    'about, in place of "it", "he" or "the passage". Only one answer can be right.\n'
    "- The answer is a name, a date, a number or a few words. Copy it from the passage "
    "letter by letter. It must not stand in the question.\n\n"
    "Write nothing but lines of this form:\nQuestion: ...\nAnswer: ...\n"
)
# The name is told, so that the model need not look for what the passages share.
WRITE_TWO = (
    'Write one quiz question that takes two steps. Both passages speak of "{name}".\n\n'
    "Title: {title}\nPassage: {text}\n\nTitle: {other_title}\nPassage: {other_text}\n\n"
    "Rules:\n- Write question and answer in the language of the passages.\n"
    "- The question asks for a fact of one passage, about a thing that it does not name but "
    "describes by a fact of the other passage, so that nobody can answer it from one passage "
    "alone.\n"
    "- It is for somebody who has never seen the passages: it never mentions them.\n"
    "- The answer is a name, a date, a number or a few words. Copy it from a passage letter "
    "by letter. It must not stand in the question.\n\n"
    "Write nothing but two lines of this form:\nQuestion: ...\nAnswer: ...\n"
)
# The passages come first: a server then keeps what it read for all questions about them.
WITH = (
    "{passages}\n\n"
    "Answer this question from what is written above, with nothing but a name, a date, a "
    "number or a few words copied from there.\nQuestion: {question}\nAnswer:"
)
# Told to guess, a model that half knows the answer shows it.
WITHOUT = (
    "Answer this question with nothing but a name, a date, a number or a few words. If you "
    "do not know, guess.\nQuestion: {question}\nAnswer:"
)
