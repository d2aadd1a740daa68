// Without this script every sample stands below the other and the browser's own hints show the numbers.
const tip = document.getElementById("tip");

function show(token) {
  tip.textContent = token.dataset.about;
  tip.hidden = false;
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const right = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${scrollX + Math.max(8, Math.min(box.left, right))}px`;
  tip.style.top = `${scrollY + box.bottom + 6}px`;
}

function hide() {
  tip.hidden = true;
}

for (const text of document.querySelectorAll(".text")) {
  const tokens = [...text.querySelectorAll(".t")];
  tokens.forEach((token, i) => {
    token.dataset.about = token.title;
    token.removeAttribute("title");
    token.tabIndex = i ? -1 : 0;  // one stop of the Tab key; arrows go on from there
  });
  for (const event of ["pointerover", "focusin", "click"]) {
    text.addEventListener(event, ({ target }) => target.dataset.about && show(target));
  }
  text.addEventListener("pointerout", hide);
  text.addEventListener("focusout", hide);
  text.addEventListener("keydown", (event) => {
    const at = tokens.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (at < 0 || to === undefined || !tokens[to]) return;
    event.preventDefault();
    tokens[at].tabIndex = -1;
    tokens[to].tabIndex = 0;
    tokens[to].focus();
  });
}

const selects = [...document.querySelectorAll(".panel select")];

function choose(select) {
  hide();
  [...select.parentElement.querySelectorAll("article")].forEach((article, i) => {
    article.hidden = i !== select.selectedIndex;
    const prompt = article.querySelector(".prompt");
    prompt.scrollTop = prompt.scrollHeight;  // the question ends a prompt, the template begins it
  });
}

for (const select of selects) {
  select.hidden = select.length < 2;
  select.addEventListener("change", () => {
    choose(select);
    const row = select.selectedOptions[0].dataset.row;  // the same prompt in the other panel, too
    for (const other of selects) {
      const same = [...other.options].findIndex((option) => option.dataset.row === row);
      if (other !== select && same >= 0) {
        other.selectedIndex = same;
        choose(other);
      }
    }
  });
}
// Begin with a prompt that stands in both panels, if there is one.
if (selects.length > 1) {
  const rows = [...selects[1].options].map((option) => option.dataset.row);
  const first = [...selects[0].options].findIndex((option) => rows.includes(option.dataset.row));
  selects[0].selectedIndex = Math.max(0, first);
  selects[1].selectedIndex = first < 0 ? selects[1].length - 1 : rows.indexOf(selects[0].selectedOptions[0].dataset.row);
}
selects.forEach(choose);
