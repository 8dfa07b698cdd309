/**
 * What all widgets share: elements, numbers in words, and the picture that the kernel sends.
 *
 * A part of each widget's module, in front of its own part; nothing is imported, because a widget's module is one text.
 */

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) {
      node.addEventListener(name.slice(2), value);
    } else if (name in node && typeof value !== 'string') {
      node[name] = value;
    } else {
      node.setAttribute(name, value);
    }
  }
  node.append(...children);
  return node;
}

/** Four digits of what was measured. */
function digits(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) {
    return '–';
  }
  const size = Math.abs(value);
  const plain = size === 0 || (size >= 1e-3 && size < 1e6);
  return plain ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

function bytes(count) {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${count.toFixed(unit && count < 10 ? 1 : 0)} ${units[unit]}`;
}

function ago(seconds) {
  for (const [unit, length] of [
    ['d', 86400],
    ['h', 3600],
    ['min', 60]
  ]) {
    if (seconds >= length) {
      return `${Math.round(seconds / length)} ${unit}`;
    }
  }
  return `${Math.max(Math.round(seconds), 0)} s`;
}

/** The state of the notebook server's lab, for a notebook that is open without its kernel; null elsewhere. */
async function labState() {
  try {
    const page = JSON.parse(
      document.getElementById('jupyter-config-data').textContent
    );
    const answer = await fetch(`${page.baseUrl}tuft/lab/state`, {
      credentials: 'same-origin'
    });
    return answer.ok ? (await answer.json()).state : null;
  } catch {
    return null;
  }
}

/**
 * Draw each picture that comes, ask for one now and whenever the page is seen again. Returns what ends it and
 * tells the kernel so.
 *
 * `fromState` makes a picture from the lab's state, or null, for when no kernel answers.
 */
function follow(model, root, draw, fromState) {
  let seen = false;
  const note = element(
    'p',
    { class: 'tuft-note', role: 'status' },
    'Waiting for the kernel …'
  );
  root.append(note);
  const show = picture => {
    seen = true;
    note.textContent = picture.problem ?? '';
    note.hidden = !picture.problem;
    draw(picture);
  };
  const heard = message => {
    if (message?.type === 'picture') {
      show(message);
    } else if (message?.type === 'look?') {
      want();
    }
  };
  const want = () => {
    if (!document.hidden) {
      model.send({ type: 'want' });
    }
  };
  model.on('msg:custom', heard);
  document.addEventListener('visibilitychange', want);
  want();
  const patience = setTimeout(async () => {
    const state = seen ? null : await labState();
    const picture = state && fromState(state);
    if (!seen && picture) {
      show({
        ...picture,
        problem: 'No kernel answers: this is what the server knows now.'
      });
    } else if (!seen) {
      note.textContent =
        'No kernel has answered yet. If there is none, run the cell again.';
    }
  }, 3000);
  return () => {
    clearTimeout(patience);
    model.off('msg:custom', heard);
    document.removeEventListener('visibilitychange', want);
    model.send({ type: 'gone' });
  };
}

/** Make `old` what `fresh` is, and leave what is the same: a button under a pressed pointer, the focus, a selection. */
function renew(old, fresh) {
  if (old.isEqualNode(fresh)) {
    return;
  }
  const alike = old.cloneNode(false).isEqualNode(fresh.cloneNode(false));
  if (alike && old.tagName === 'BUTTON') {
    return; // it says “copied” for a moment
  }
  const [before, after] = [[...old.childNodes], [...fresh.childNodes]];
  if (alike && before.length && before.length === after.length) {
    before.forEach((child, i) => renew(child, after[i]));
  } else {
    old.replaceWith(fresh);
  }
}

/** A table that is drawn anew as a whole: `columns` are [heading, cell of a row, is it a number]. */
function table(caption, columns, rows, empty) {
  if (!rows.length) {
    return element('p', { class: 'tuft-note' }, empty);
  }
  const head = columns.map(([name]) => element('th', { scope: 'col' }, name));
  const body = rows.map(row =>
    element(
      'tr',
      {},
      ...columns.map(([, cell, isNumber]) =>
        element('td', isNumber ? { class: 'tuft-number' } : {}, cell(row))
      )
    )
  );
  return element(
    'table',
    { class: 'tuft-table' },
    element('caption', {}, caption),
    element('thead', {}, element('tr', {}, ...head)),
    element('tbody', {}, ...body)
  );
}

/** A widget that is one such table: of `rows` of each picture, or of the lab's state. */
function tableWidget({ rows, caption, columns, empty, fromState }) {
  return {
    render({ model, el }) {
      const root = element('div', { class: 'tuft-widget' });
      const body = element('div', { class: 'tuft-scroll' });
      root.append(body);
      el.append(root);
      body.append(table(caption, columns, [], ''));
      const draw = picture =>
        picture[rows] &&
        renew(body.firstChild, table(caption, columns, picture[rows], empty));
      return follow(model, root, draw, state => ({
        [rows]: fromState(state, model).reverse()
      }));
    }
  };
}

/** Browsers have a clipboard for pages that are encrypted or of this machine; the older way works everywhere. */
async function toClipboard(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = element('textarea', {});
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand('copy');
  field.remove();
}

/** A button that puts text on the clipboard and says so. */
function copier(text, label, spoken) {
  const button = element(
    'button',
    { type: 'button', class: 'tuft-button', 'aria-label': spoken },
    label
  );
  button.addEventListener('click', async () => {
    await toClipboard(text);
    button.focus();
    button.textContent = 'copied';
    setTimeout(() => (button.textContent = label), 1200);
  });
  return button;
}

function shortName(run) {
  const [session, number] = run.split(':train:');
  return number === undefined ? run : `${session.slice(0, 8)}:${number}`;
}
