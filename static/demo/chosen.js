/* Before anything is drawn: the colours that were chosen here. No module, so that the page waits for it. */
try {
  const theme = localStorage.getItem("realtime-theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch {
  // Storage may not be used: it is as the system has it.
}
