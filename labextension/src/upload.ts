/**
 * A dropped PEFT adapter as one tar archive: an archive as it is, a folder packed here.
 *
 * The archive is POSIX ustar with the adapter's own files and no directories; the server checks what is in it.
 */

const FILES = ['adapter_config.json', 'adapter_model.safetensors'];
const ARCHIVE = /\.(tar|tar\.gz|tgz)$/i;
const BLOCK = 512;

/** What was dropped: what to send, and what to call it. */
export interface IDropped {
  name: string;
  archive: Blob;
}

/** The entries of what is dropped, which are only there until the event has been handled. */
export function entriesOf(items: DataTransfer): FileSystemEntry[] {
  return [...items.items]
    .map(item => item.webkitGetAsEntry?.() ?? null)
    .filter((entry): entry is FileSystemEntry => entry !== null);
}

/** Ask for files. Never resolves if the person closes the question: nothing is to happen then. */
export function chooseFiles(): Promise<File[]> {
  return new Promise(resolve => {
    const input = document.createElement('input');
    input.type = 'file';
    input.multiple = true;
    input.accept = '.tar,.gz,.tgz,.json,.safetensors';
    input.onchange = () => resolve([...(input.files ?? [])]);
    input.click();
  });
}

/** The adapter among files or in a folder, or null if there is none. */
export async function adapterOf(
  files: File[],
  entries: FileSystemEntry[]
): Promise<IDropped | null> {
  const folder = entries.find(entry => entry.isDirectory);
  if (folder) {
    const inside = await filesOf(folder as FileSystemDirectoryEntry);
    return pack(inside, folder.name);
  }
  const archive = files.find(({ name }) => ARCHIVE.test(name));
  return archive
    ? { name: label(archive.name.replace(ARCHIVE, '')), archive }
    : pack(files, 'adapter');
}

async function pack(files: File[], name: string): Promise<IDropped | null> {
  const found = FILES.map(one => files.find(file => file.name === one));
  return found.every(file => file !== undefined)
    ? { name: label(name), archive: tar(found as File[]) }
    : null;
}

/** A name that a checkpoint may have. */
function label(name: string): string {
  const plain = name
    .replace(/[^A-Za-z0-9._-]+/g, '-')
    .replace(/^[^A-Za-z0-9]+/, '');
  return plain.slice(0, 128) || 'adapter';
}

async function filesOf(folder: FileSystemDirectoryEntry): Promise<File[]> {
  const reader = folder.createReader();
  const entries: FileSystemEntry[] = [];
  for (;;) {
    const more = await new Promise<FileSystemEntry[]>((done, failed) =>
      reader.readEntries(done, failed)
    );
    if (!more.length) {
      break;
    }
    entries.push(...more);
  }
  return Promise.all(
    entries
      .filter(entry => entry.isFile && FILES.includes(entry.name))
      .map(
        entry =>
          new Promise<File>((done, failed) =>
            (entry as FileSystemFileEntry).file(done, failed)
          )
      )
  );
}

/** POSIX.1-1988 (ustar) with regular files only. */
export function tar(files: readonly File[]): Blob {
  const parts: BlobPart[] = files.flatMap(file => [
    header(file.name, file.size) as BlobPart,
    file,
    new Uint8Array((BLOCK - (file.size % BLOCK)) % BLOCK)
  ]);
  return new Blob([...parts, new Uint8Array(2 * BLOCK)], {
    type: 'application/x-tar'
  });
}

function header(name: string, size: number): Uint8Array {
  const block = new Uint8Array(BLOCK);
  const write = (at: number, text: string) =>
    block.set(new TextEncoder().encode(text), at);
  const octal = (value: number, digits: number) =>
    value.toString(8).padStart(digits, '0') + '\0';
  write(0, name);
  write(100, octal(0o644, 7));
  write(108, octal(0, 7));
  write(116, octal(0, 7));
  write(124, octal(size, 11));
  write(136, octal(0, 11));
  write(148, ' '.repeat(8));
  write(156, '0');
  write(257, 'ustar\0' + '00');
  const sum = block.reduce((total, byte) => total + byte, 0);
  write(148, octal(sum, 6) + ' ');
  return block;
}
