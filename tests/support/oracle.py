"""A simulated engine that knows the miniature's facts and does what it is told, or what it should not."""

from zs_lightning.miniature.checks import Truth
from zs_lightning.miniature.world import sentence
from zs_lightning.search import SearchEngine
from zs_lightning.search.orders import Orders
from zs_lightning.text.prompts import MINIATURE, USEFUL
from zs_lightning.types import Document, SearchResult

TRUTH = Truth(0)
FACTS = TRUTH.world.facts
AWAY = [sentence(*key, value) for key, value in FACTS.items() if key[1] == "spouse"]


class Oracle(SearchEngine):
    """Useful results state the asked fact, noisy ones two others. Whatever the query is, the golden
    answer is told where it is not withheld; queries, and pairs of query and label, in `failing` fail."""

    name = "oracle"

    def __init__(self, guard="rule", failing=(), obeys=True):
        self.count = 2
        self.prompts = MINIATURE
        self.orders = Orders(MINIATURE, self.count, None, False, guard, None)
        self.failing = failing
        self.obeys = obeys
        self.requests = []
        self.done = []
        self.written = 0

    def submit(self, requests):
        for request in requests:
            self.requests.append(request)
            plan = self.orders.plan(request)
            self.written += 10
            if request.query in self.failing or (request.query, plan.label) in self.failing:
                self.done.append(SearchResult(key=request.key, failure="gone"))
            else:
                texts = self.texts(request, plan.label, plan.withheld) if plan.parts else []
                self.done.append(plan.result(request.key, tuple(Document(text=text) for text in texts)))

    def texts(self, request, label, withheld):
        first = AWAY[request.seed % len(AWAY)]
        asked = TRUTH.asked(request.query)
        if asked and (label == USEFUL or not self.obeys):
            return [sentence(*asked, FACTS[asked]), first]
        if asked or withheld:
            return [first, AWAY[(request.seed + 1) % len(AWAY)]]
        return [f"It is {request.example.golden_answers[0]}.", first]

    def counted(self):
        return {"tokens": float(self.written)}

    def poll(self):
        done, self.done = self.done[::-1], []
        return done
