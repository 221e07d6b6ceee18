"use strict";
(() => {
  const box = document.getElementById("sampler");
  if (!box) return;
  box.classList.add("live");
  const pick = (name) => box.querySelector(`[data-pick="${name}"]`).value;
  const show = () => {
    const levels = [...box.querySelectorAll("[data-dial]")].map((dial) => {
      dial.parentElement.querySelector("output").textContent = dial.value;
      return dial.value;
    });
    const key = `${pick("method")}|${pick("prompt")}|${levels.join(",")}`;
    for (const part of box.querySelectorAll(".answer"))
      part.classList.toggle("shown", part.dataset.key === key);
    for (const part of box.querySelectorAll(".question"))
      part.classList.toggle("shown", part.dataset.prompt === pick("prompt"));
  };
  box.addEventListener("input", show);
  show();
})();
